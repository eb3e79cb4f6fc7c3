"""The architecture of a Qwen + geometry policy; sizes of state, action and images: the contract."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reflexarc.policy.backbones.geometry_encoder import GeometryEncoderConfig
from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.interface import PolicyConfig
from reflexarc.policy.layers.keypoints import KeypointsConfig

CompressorName = Literal["none", "pool", "per_layer", "qformer", "control"]
Storage = Literal["own", "every"]


class SemanticConfig(PolicyConfig):
    """Which network gives the states that the head's layers attend to, one a layer.

    Attributes:
        name: ``qwen2_5_vl``: a Qwen2.5-VL model, trained or frozen as the recipe says. ``compact``:
            frozen image features and a sentence embedding through a small transformer, for a CPU.
        path: of ``qwen2_5_vl``: a folder that ``save_pretrained`` wrote, with its tokenizer, or a
            hub id. A checkpoint carries weights, configuration and tokenizer itself.
        max_instruction_tokens: of ``qwen2_5_vl``: instructions are padded to it; the padding is
            masked. A longer instruction is refused.
        precision: of ``qwen2_5_vl``'s weights. Trained weights are fp32 as a rule.
        vision, keypoints: of ``compact``: the frozen features, and what is looked for in them.
        width, heads: of ``compact``; it has as many layers as the head.
    """

    name: Literal["qwen2_5_vl", "compact"] = "qwen2_5_vl"
    path: str | None = Field(default=None, min_length=1)
    max_instruction_tokens: int = Field(default=48, ge=8, le=1024)
    precision: Literal["fp32", "bf16"] = "fp32"
    vision: VisionBackboneConfig | None = None
    keypoints: KeypointsConfig = KeypointsConfig()
    width: int = Field(default=128, ge=8)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _options_belong_to_the_name(self) -> SemanticConfig:
        if self.name == "qwen2_5_vl":
            if self.path is None:
                raise ValueError("semantic qwen2_5_vl needs path: a local folder or a hub id")
            if self.vision is not None:
                raise ValueError("semantic.vision belongs to compact, not to qwen2_5_vl")
            return self
        if self.path is not None or self.precision != "fp32":
            raise ValueError("semantic.path and semantic.precision belong to qwen2_5_vl")
        if self.vision is None:
            raise ValueError("semantic compact needs vision, such as {name: efficientnet_lite0}")
        if self.vision.name == "conv2d":
            raise ValueError("semantic.vision must be frozen (not conv2d)")
        if self.width % self.heads:
            raise ValueError(f"semantic.width {self.width} is no multiple of heads {self.heads}")
        return self


class HeadConfig(PolicyConfig):
    """The diffusion transformer. Defaults are the document's: 977.75 M with states of 2048.

    Attributes:
        layers: of the transformer; each attends to a state of its own.
        heads, head_dimension: their product is the width.
        feed_forward: hidden width of a layer's MLP, in widths.
        self_attention: tokens of the chunk attend to each other too. Without it, as in the
            document, no action sees the robot's state or another action.
        future_tokens: learned tokens beside state and actions.
        positions: learned embeddings of a step's place in the chunk.
        output_dimension, output_hidden: of what makes velocities of the last layer.
        state_hidden, state_octaves: of the state's MLP, and waves beside the state (0: none).
        dropout: in attention and MLP.
    """

    layers: int = Field(default=16, ge=1)
    heads: int = Field(default=32, ge=1)
    head_dimension: int = Field(default=64, ge=2, multiple_of=2)
    feed_forward: int = Field(default=4, ge=1)
    self_attention: bool = False
    future_tokens: int = Field(default=32, ge=0)
    positions: int = Field(default=1024, ge=1)
    output_dimension: int = Field(default=2560, ge=1)
    output_hidden: int = Field(default=1024, ge=1)
    state_hidden: int = Field(default=1024, ge=1)
    state_octaves: int = Field(default=0, ge=0, le=12)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def width(self) -> int:
        return self.heads * self.head_dimension


class QwenGeometryConfig(PolicyConfig):
    """See the module.

    Attributes:
        semantic, geometry, head: the three networks. ``geometry`` may be left out with ``none``.
        compressor: what makes ``geometry_tokens`` of an encoder's tokens. ``pool``: means over
            cells of the image, projected, the same for every layer; ``per_layer``: the same means
            with a projection for each layer; ``qformer``: learned queries attend to all tokens;
            ``none``: no geometry; ``control``: as many parameters as ``control_of`` has, fed with
            fixed random tokens in the place of the encoder's.
        geometry_tokens: K, a multiple of the number of cameras for the compressors that pool.
        qformer_heads: of ``qformer``.
        stored_geometry: what a row of the feature store holds: ``own`` is what this compressor
            reads; ``every`` holds means and tokens, so that one store serves all compressors.
        language_dimension: of an instruction's embedding, which ``compact`` reads.
        normed: norm and type embedding on semantic and on geometric tokens before they are joined.
            A language model's states are tens of times as long as fresh geometry tokens.
        denoising_steps: Euler steps when a request names none.
        noise_scale: factor on the noise that sampling starts from; see StateVLA's.
    """

    semantic: SemanticConfig
    geometry: GeometryEncoderConfig | None = None
    head: HeadConfig = HeadConfig()
    compressor: CompressorName = "pool"
    control_of: Literal["pool", "per_layer", "qformer"] = "pool"
    geometry_tokens: int = Field(default=16, ge=1)
    qformer_heads: int = Field(default=8, ge=1)
    stored_geometry: Storage = "own"
    language_dimension: int = Field(default=384, ge=1)
    normed: bool = True
    denoising_steps: int = Field(default=4, ge=1, le=100)
    noise_scale: float = Field(default=1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _compressors_have_an_encoder(self) -> QwenGeometryConfig:
        if self.compressor != "none" and self.geometry is None:
            raise ValueError(
                f"compressor {self.compressor} needs geometry: the encoder of its tokens, such as "
                "{name: dinov2, path: DIR}"
            )
        if self.stored_geometry == "every" and self.geometry is None:
            raise ValueError("stored_geometry every needs geometry, an encoder")
        return self

    @property
    def form(self) -> Literal["pool", "per_layer", "qformer"] | None:
        """The compressor's form, that of ``control_of`` for a control; None for ``none``."""
        if self.compressor == "none":
            return None
        return self.control_of if self.compressor == "control" else self.compressor
