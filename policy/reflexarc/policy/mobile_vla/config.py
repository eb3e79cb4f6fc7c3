"""The architecture of a Mobile VLA; the window, the chunk and the images are the contract's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, field_validator

from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.interface import PolicyConfig

TEXT_PROJECTIONS = r"text\.model\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|out_proj)"
"""The attention of Kosmos-2's text model. The vision tower has projections of these names too."""


class LoRAConfig(PolicyConfig):
    """Low-rank adapters by PEFT (arXiv 2106.09685).

    Attributes:
        rank: r.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on what an adapter reads, while training.
        target_modules: regular expression over module paths of the backbone.
    """

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    target_modules: str = TEXT_PROJECTIONS


class Kosmos2Config(PolicyConfig):
    """Kosmos-2, frozen, with adapters in its text model.

    Attributes:
        path: a folder that ``save_pretrained`` wrote (model and processor), or a hub id.
            Checkpoints name it with its weights' sha256 and do not copy it.
        precision: of the frozen weights; adapters stay fp32.
        lora: the adapters.
        max_text_tokens: an instruction of more tokens is an error; rows of the session are padded
            to so many.
    """

    name: Literal["kosmos2"] = "kosmos2"
    path: str = Field(default="microsoft/kosmos-2-patch14-224", min_length=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    lora: LoRAConfig = LoRAConfig()
    max_text_tokens: int = Field(default=256, ge=1, le=1024)


class QueriesConfig(PolicyConfig):
    """Of :class:`reflexarc.policy.mobile_vla.queries.InstructionQueries`.

    Attributes:
        number: of queries, each with a place and a value of its own.
        key_width: of queries and keys.
        hidden: of the perceptron that makes a patch's key.
        values: channels of a value.
    """

    number: int = Field(default=16, ge=1)
    key_width: int = Field(default=32, ge=1)
    hidden: int = Field(default=64, ge=1)
    values: int = Field(default=16, ge=1)


class CompactConfig(PolicyConfig):
    """For a CPU and without the hub: a frozen vision encoder, and queries that the instruction
    makes.

    Attributes:
        vision: the frozen encoder.
        queries: what is looked for in its patches.
        width: of a frame's feature.
        language_dimension: of an instruction's embedding.
    """

    name: Literal["compact"] = "compact"
    vision: VisionBackboneConfig = VisionBackboneConfig(pool=1)
    queries: QueriesConfig = QueriesConfig()
    width: int = Field(default=256, ge=8)
    language_dimension: int = Field(default=384, ge=1)

    @field_validator("vision")
    @classmethod
    def _vision_is_frozen(cls, vision: VisionBackboneConfig) -> VisionBackboneConfig:
        if vision.name == "conv2d":
            raise ValueError("backbone.vision must be frozen, not conv2d")
        return vision


class MobileVLAConfig(PolicyConfig):
    """Defaults are the published size.

    Attributes:
        backbone: what makes one feature of a frame and the instruction.
        lstm_layers, lstm_hidden: of the LSTM over the window.
        head_hidden: widths of the perceptron that makes velocities of its outputs.
        dropout: between the LSTM's layers, while training.
        head_sees_frame: whether the perceptron sees each frame's feature beside the LSTM's output,
            so that a backbone that starts from random weights learns before the LSTM does.
    """

    backbone: Annotated[Kosmos2Config | CompactConfig, Discriminator("name")] = Kosmos2Config()
    lstm_layers: int = Field(default=4, ge=1, le=16)
    lstm_hidden: int = Field(default=1024, ge=1)
    head_hidden: tuple[int, ...] = (1024, 512)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    head_sees_frame: bool = False
