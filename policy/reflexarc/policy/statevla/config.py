"""The architecture of a StateVLA; sizes of state, action and images come from the contract."""

from __future__ import annotations

from pydantic import Field

from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.interface import PolicyConfig
from reflexarc.policy.layers.keypoints import KeypointsConfig


class StateVLAConfig(PolicyConfig):
    """Defaults are the published size; the small recipes set their own.

    Attributes:
        d_model: width of every token.
        encoder_layers: Mamba blocks of the encoder.
        d_state, d_conv, expand: of the encoder's Mamba blocks.
        bidirectional: whether every token sees those after it too; a half more arithmetic.
        latent_tokens: learned tokens at the end of the sequence whose outputs are z.
        vision: frozen vision backbone and pooling.
        keypoints: learned keypoints instead of a token for every patch; None takes patches.
        language_dimension: of an instruction's embedding.
        state_octaves: of sines and cosines that stand beside the state; 0 is the plain state.
        state_hidden: width of the state's two-layer projection.
        policy_layers: Mamba blocks of the flow-matching head.
        policy_d_state: state size of the head's Mamba blocks.
        policy_mlp_hidden: gated MLP of the head's blocks; 0 leaves it out.
        gripper_hidden: width of the gripper classifier.
        denoising_steps: Euler steps when a request names none.
        noise_scale: factor on the noise that sampling starts from. Below 1 it trades diversity
            for precision; at 0 the chunk is the flow's image of the origin, the same for every
            seed. Training always sees the full noise.
    """

    d_model: int = Field(default=256, ge=8, multiple_of=2)
    encoder_layers: int = Field(default=12, ge=1)
    d_state: int = Field(default=16, ge=1)
    d_conv: int = Field(default=4, ge=2, le=4)
    expand: int = Field(default=2, ge=1)
    bidirectional: bool = False
    latent_tokens: int = Field(default=1, ge=1)
    vision: VisionBackboneConfig = VisionBackboneConfig()
    keypoints: KeypointsConfig | None = None
    language_dimension: int = Field(default=384, ge=1)
    state_octaves: int = Field(default=0, ge=0, le=12)
    state_hidden: int = Field(default=256, ge=1)
    policy_layers: int = Field(default=3, ge=1)
    policy_d_state: int = Field(default=64, ge=1)
    policy_mlp_hidden: int = Field(default=256, ge=0)
    gripper_hidden: int = Field(default=256, ge=1)
    denoising_steps: int = Field(default=4, ge=1, le=100)
    noise_scale: float = Field(default=1.0, ge=0.0, le=1.0)
