"""The architecture of a V-JEPA 2 policy head; sizes of state, action and clips are the contract's.

Whether the goal is an image, an instruction or both stands in the contract too
(``needs_goal_image``, ``needs_language``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reflexarc.policy.backbones.clip_encoder import ClipEncoderConfig
from reflexarc.policy.interface import PolicyConfig
from reflexarc.policy.layers.keypoints import KeypointsConfig


class VJEPA2HeadConfig(PolicyConfig):
    """Defaults are the published size.

    Attributes:
        clips: frozen encoder of clips.
        grid_side: a camera's tokens are a square of ``grid_side * grid_side``: 8 gives 64.
        keypoints: learned keypoints say where things are in that square, and the decoder reads
            their few tokens; None gives it every token, as published. For encoders whose frames
            are cheap and whose grids are fine.
        static_clips: the feature store holds beside each clip its newest frame standing still, for
            the objective's ``static_aug``. Twice the work and the disk; serving is not touched.
        normalize: scale every video and goal token to unit length (after the store, so that the
            same store serves both).
        hidden_dim: width of context and decoder.
        num_layers, num_heads, feed_forward, dropout: of the transformer decoder.
        proprioception_hidden: widths of the two-layer encoder of past states.
        proprioception_tokens: that it becomes.
        state_octaves: of sines and cosines that stand beside each state; 0 is the plain state.
        language_dimension: of an instruction's embedding, where the contract needs language.
        gripper: ``bce``: a classifier commands it; ``tanh``: it is regressed, as any dimension.
    """

    clips: ClipEncoderConfig
    grid_side: int = Field(default=8, ge=1, le=64)
    keypoints: KeypointsConfig | None = None
    static_clips: bool = False
    normalize: bool = True
    hidden_dim: int = Field(default=512, ge=8)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=8, ge=1)
    feed_forward: int = Field(default=2048, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    proprioception_hidden: tuple[int, int] = (128, 256)
    proprioception_tokens: int = Field(default=4, ge=1)
    state_octaves: int = Field(default=0, ge=0, le=12)
    language_dimension: int = Field(default=384, ge=1)
    gripper: Literal["bce", "tanh"] = "bce"

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> VJEPA2HeadConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is no multiple of num_heads {self.num_heads}"
            )
        return self

    @property
    def tokens(self) -> int:
        """Of one camera, and of the goal."""
        return self.grid_side**2
