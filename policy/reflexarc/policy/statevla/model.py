"""StateVLA behind the :class:`Policy` interface.

Frozen vision features, language and state become one token sequence; a causal Mamba reads it;
the outputs of the last, learned tokens are the latent state z; a flow-matching head turns noise
into motion given z, and a classifier commands the gripper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.backbones.vision import VisionBackbone, build_vision_backbone
from reflexarc.policy.interface import (
    FrozenBackbone,
    Policy,
    PolicyConfig,
    SamplingSpec,
    Task,
    Tensors,
)
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.statevla.action_head import FlowMatchingHead, GripperHead
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.encoder import Encoder, Representation, Tokenizer
from reflexarc.policy.statevla.token_layout import TokenLayout

OPEN, CLOSED = -1.0, 1.0
"""The gripper column of a normalised chunk, whatever the robot's own commands are."""


class StateVLA(Policy):
    """See the module. ``A`` below is the number of action dimensions without the gripper."""

    family = "statevla"
    config_class = StateVLAConfig
    config: StateVLAConfig
    graph_safe = True

    def __init__(
        self, config: StateVLAConfig, contract: PolicyContract, language: LanguageEmbeddings
    ):
        super().__init__()
        _check(config, contract, language)
        self.config = config
        self.contract = contract
        self.language = language
        horizon, gripper = contract.action.horizon, contract.action.gripper
        self.motion_dimensions = contract.action.dimension - (gripper is not None)
        self.sampling = SamplingSpec(
            noise_shape=(horizon, self.motion_dimensions),
            default_steps=config.denoising_steps,
            supports_prefix=True,
            supports_guide=True,
        )
        self.vision: VisionBackbone = build_vision_backbone(config.vision)
        tokenizer = Tokenizer(
            config,
            state=contract.state.dimension,
            cameras=len(contract.cameras),
            grid=_grid(self.vision, contract),
            channels=self.vision.channels,
            patches=self.vision.trained_patches(),
        )
        self.representation = Representation(tokenizer, Encoder(config))
        self.flow = FlowMatchingHead(config, horizon=horizon, action=self.motion_dimensions)
        self.gripper = GripperHead(config, horizon=horizon) if gripper is not None else None

    @classmethod
    def build(
        cls, config: PolicyConfig, contract: PolicyContract, extra_files: Mapping[str, bytes]
    ) -> StateVLA:
        if not isinstance(config, StateVLAConfig):
            raise ConfigError(f"StateVLA needs a StateVLAConfig, got {type(config).__name__}")
        return cls(config, contract, LanguageEmbeddings.from_files(extra_files))

    def extra_files(self) -> Mapping[str, bytes]:
        return self.language.to_files()

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        return {"vision": self.vision.identity}

    @property
    def token_layout(self) -> TokenLayout:
        """Which tokens of the encoder's sequence belong to which modality."""
        rows, columns = _grid(self.vision, self.contract)
        keypoints = self.config.keypoints
        return TokenLayout(
            cameras=self.contract.camera_names,
            camera_tokens=rows * columns if keypoints is None else keypoints.tokens,
            grid=(rows, columns) if keypoints is None else None,
            latent_tokens=self.config.latent_tokens,
            d_model=self.config.d_model,
        )

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.representation.encoder.stack.blocks, *self.flow.stack.blocks]

    def component_parameters(self) -> Mapping[str, int]:
        """As the base class counts them, with the representation in its two parts."""
        parts = dict(super().component_parameters())
        del parts["representation"]
        inside = self.representation.named_children()
        return {
            name: sum(p.numel() for p in module.parameters()) for name, module in inside
        } | parts

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        """``{"language": float32 (N, E)}``."""
        vectors = self.language.lookup([task.instruction for task in tasks])
        return {"language": vectors.to(self.device)}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        """``{"vision": float32 (N, V, P, C)}``: frozen features, cameras as in the contract.

        With patches that are trained, ``uint8 (N, V, H, W, 3)``: the pixels.
        """
        images = torch.stack([frames[name] for name in self.contract.camera_names], dim=1)
        features = self.vision(images.flatten(0, 1))
        return {"vision": features.unflatten(0, images.shape[:2])}

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        """``{"z": (B, K, d_model)}`` from the newest row of the window."""
        return {"z": self.representation(task, window, valid)}

    def velocity(self, context: Tensors, x_t: Tensor, t: Tensor) -> Tensor:
        """Velocity ``(B, H, A)`` at ``x_t (B, H, A)`` and ``t (B,)``, t = 1 being noise."""
        velocity: Tensor = self.flow(context["z"], x_t, t)
        return velocity

    def gripper_logits(self, context: Tensors) -> Tensor:
        """``(B, H)`` logits of "closed"."""
        if self.gripper is None:
            raise ConfigError("this policy's contract has no gripper")
        logits: Tensor = self.gripper(context["z"])
        return logits

    def sample_actions(
        self,
        context: Tensors,
        noise: Tensor | None,
        *,
        steps: int,
        prefix: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        if noise is None:
            raise ConfigError(f"StateVLA samples from noise (B, {self.sampling.noise_shape})")
        start = noise * self.config.noise_scale
        known = None if prefix is None else self._motion(prefix)
        near = None if guide is None else self._motion(guide)
        motion = self.flow.sample(context["z"], start, steps, known, near)
        gripper = self.contract.action.gripper
        if gripper is None:
            return motion
        command = torch.where(self.gripper_logits(context) > 0, CLOSED, OPEN).to(motion.dtype)
        before, after = motion[..., : gripper.index], motion[..., gripper.index :]
        chunk = torch.cat([before, command.unsqueeze(-1), after], dim=-1)
        return chunk if prefix is None else torch.cat([prefix, chunk[:, prefix.shape[1] :]], dim=1)

    def _motion(self, actions: Tensor) -> Tensor:
        """``(B, P, D)`` without the gripper's column: ``(B, P, A)``."""
        gripper = self.contract.action.gripper
        if gripper is None:
            return actions
        return torch.cat([actions[..., : gripper.index], actions[..., gripper.index + 1 :]], dim=-1)


def _check(config: StateVLAConfig, contract: PolicyContract, language: LanguageEmbeddings) -> None:
    if contract.family != StateVLA.family:
        raise ConfigError(f"the contract is of the family {contract.family!r}, not 'statevla'")
    if not contract.cameras:
        raise ConfigError("StateVLA needs a camera; the contract has none", field="cameras")
    history = contract.history
    if (history.frames, history.states) != (1, 1):
        raise ConfigError(
            f"StateVLA sees one frame and one state, the contract's history has "
            f"{history.frames} and {history.states}",
            field="history",
        )
    if language.dimension != config.language_dimension:
        raise ConfigError(
            f"language_dimension is {config.language_dimension}, but the embeddings of "
            f"{language.encoder} have {language.dimension}",
            field="language_dimension",
        )


def _grid(vision: VisionBackbone, contract: PolicyContract) -> tuple[int, int]:
    """Rows and columns of one image's patches; all cameras must give the same."""
    sizes = {(camera.height, camera.width) for camera in contract.cameras}
    if len(sizes) != 1:
        raise ConfigError(
            f"StateVLA needs one image size for all cameras, the contract has {sorted(sizes)}",
            field="cameras",
        )
    rows, columns = vision.grid(*sizes.pop())
    if rows * columns == 0:
        raise ConfigError(
            f"images are too small: {vision.identity.name} sees one cell in {vision.stride} "
            f"pixels, pooled by {vision.pool}",
            field="cameras",
        )
    return rows, columns
