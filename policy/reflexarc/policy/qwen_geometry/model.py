"""Qwen2.5-VL and 3D geometry before a diffusion transformer, behind the :class:`Policy` interface.

A language-vision model gives a state for each layer of the head; a frozen encoder of geometry
gives tokens of the same images, which a compressor makes few enough to stand beside every state.
The geometry goes past the language model, straight into the head's cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.backbones.geometry_encoder import GeometryEncoder, build_geometry_encoder
from reflexarc.policy.interface import (
    FrozenBackbone,
    Policy,
    PolicyConfig,
    SamplingSpec,
    Task,
    Tensors,
)
from reflexarc.policy.qwen_geometry.compressors import (
    Control,
    build_compressor,
    cells_of,
    pool_cells,
)
from reflexarc.policy.qwen_geometry.config import QwenGeometryConfig
from reflexarc.policy.qwen_geometry.head import DiffusionHead
from reflexarc.policy.qwen_geometry.joining import Joining
from reflexarc.policy.qwen_geometry.making import make_semantic
from reflexarc.policy.qwen_geometry.semantic import Semantic

OPEN, CLOSED = -1.0, 1.0
"""The gripper column of a normalised chunk, whatever the robot's own commands are."""


class QwenGeometry(Policy):
    """See the module. K is the number of geometry tokens, G that of the encoder's, D their width.

    The gripper is one of the dimensions that flow, as in the document.
    """

    family = "qwen_geometry"
    config_class = QwenGeometryConfig
    config: QwenGeometryConfig
    graph_safe = True
    bf16_safe = True
    gripper_flows = True

    def __init__(
        self, config: QwenGeometryConfig, contract: PolicyContract, semantic: Semantic
    ) -> None:
        super().__init__()
        _check(config, contract)
        self.config = config
        self.contract = contract
        action = contract.action
        self.sampling = SamplingSpec(
            noise_shape=(action.horizon, action.dimension),
            default_steps=config.denoising_steps,
            supports_prefix=True,
            supports_guide=True,
        )
        self.semantic = semantic
        self.geometry = self._geometry()
        self.compressor = self._compressor()
        self.joining = (
            Joining(semantic.width, geometry=self.compressor is not None) if config.normed else None
        )
        self.head = DiffusionHead(
            config.head,
            source=semantic.width,
            state=contract.state.dimension,
            horizon=action.horizon,
            actions=action.dimension,
        )

    @classmethod
    def build(
        cls, config: PolicyConfig, contract: PolicyContract, extra_files: Mapping[str, bytes]
    ) -> QwenGeometry:
        if not isinstance(config, QwenGeometryConfig):
            raise ConfigError(
                f"QwenGeometry needs a QwenGeometryConfig, got {type(config).__name__}"
            )
        _check(config, contract)  # before a model of billions is loaded
        return cls(config, contract, make_semantic(config, contract, extra_files))

    @classmethod
    def reads_instructions(cls, config: PolicyConfig) -> bool:
        """Qwen2.5-VL reads words; ``compact`` looks their embeddings up."""
        return isinstance(config, QwenGeometryConfig) and config.semantic.name == "qwen2_5_vl"

    def extra_files(self) -> Mapping[str, bytes]:
        return self.semantic.extra_files()

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        parts: dict[str, Mapping[str, FrozenBackbone]] = {"semantic": self.semantic.identities()}
        if self.geometry is not None:
            parts["geometry"] = self.geometry.identities
        return {
            f"{part}.{path}" if path else part: identity
            for part, identities in parts.items()
            for path, identity in identities.items()
        }

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.semantic.blocks(), *self.head.layers]

    def component_parameters(self) -> Mapping[str, int]:
        """Of semantic, compressor, joining and head, without frozen backbones inside them."""
        frozen = tuple(f"{path}." for path in self.frozen_backbones())
        counts = dict.fromkeys(("semantic", "compressor", "joining", "head"), 0)
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            if part in counts and not name.startswith(frozen):
                counts[part] += parameter.numel()
        return counts

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        """As the semantic part keeps instructions."""
        rows = self.semantic.task_rows(tasks)
        return {name: values.to(self.device) for name, values in rows.items()}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        """``"semantic"``: pixels or features; ``"cells" (N, K, D)`` and ``"geometry" (N, G, D)``
        float32 as far as the compressor reads them, or all of it where ``stored_geometry`` says so.
        """
        images = torch.stack([frames[name] for name in self.contract.camera_names], dim=1)
        rows = {"semantic": self.semantic.frame_rows(images)}
        wanted = self._stored()
        if self.geometry is None or not wanted:
            return rows
        tokens = self.geometry(images)
        if "cells" in wanted:
            rows["cells"] = pool_cells(tokens, self._cells())
        if "geometry" in wanted:
            rows["geometry"] = tokens.flatten(1, 3)
        return rows

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        """The head's context: keys and values of every layer, the mask, state and future tokens."""
        states, mask = self.semantic(task, window["semantic"][:, -1])
        geometry = self.compressed(window)
        if self.joining is not None:
            states, geometry = self.joining(states, geometry)
        if geometry is not None:
            both = zip(states, geometry, strict=True)
            states = [torch.cat([one, two.to(one.dtype)], dim=1) for one, two in both]
            mask = torch.cat([mask, mask.new_ones(geometry[0].shape[:2])], dim=1)
        return self.head.context(states, mask, window["state"][:, -1])

    def compressed(self, window: Tensors) -> list[Tensor] | None:
        """Geometry tokens ``(B, K, C)`` for each layer; None without geometry."""
        if self.compressor is None:
            return None
        name = "geometry" if self.config.form == "qformer" else "cells"
        compressed: list[Tensor] = self.compressor(window[name][:, -1])
        return compressed

    def velocity(self, context: Tensors, x_t: Tensor, t: Tensor) -> Tensor:
        """Velocity ``(B, H, D)`` at ``x_t (B, H, D)`` and ``t (B,)``, t = 1 being noise."""
        self._check_horizon(x_t)
        velocity: Tensor = self.head(context, x_t, t)
        return velocity

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
            raise ConfigError(f"QwenGeometry samples from noise (B, {self.sampling.noise_shape})")
        self._check_horizon(noise)
        start = noise * self.config.noise_scale
        chunk = self.head.sample(context, start, steps, prefix, guide).float()
        gripper = self.contract.action.gripper
        if gripper is None:
            return chunk
        command = torch.where(chunk[..., gripper.index] > 0, CLOSED, OPEN)
        before, after = chunk[..., : gripper.index], chunk[..., gripper.index + 1 :]
        return torch.cat([before, command.unsqueeze(-1), after], dim=-1)

    def _check_horizon(self, actions: Tensor) -> None:
        horizon = self.contract.action.horizon
        if actions.shape[1] != horizon:
            raise ConfigError(
                f"this policy has chunks of {horizon} steps, got {actions.shape[1]}; data, noise "
                "and head must have one horizon (contract.horizon)",
                field="contract.horizon",
            )

    def _stored(self) -> set[str]:
        if self.config.stored_geometry == "every":
            return {"cells", "geometry"}
        form = self.config.form
        return set() if form is None else {"geometry" if form == "qformer" else "cells"}

    def _geometry(self) -> GeometryEncoder | None:
        config = self.config.geometry
        return build_geometry_encoder(config) if config is not None and self._stored() else None

    def _grid(self) -> tuple[int, int]:
        assert self.geometry is not None
        camera = self.contract.cameras[0]
        return self.geometry.grid(camera.height, camera.width)

    def _cells(self) -> tuple[int, int]:
        return cells_of(self._grid(), len(self.contract.cameras), self.config.geometry_tokens)

    def _compressor(self) -> nn.Module | None:
        config, form = self.config, self.config.form
        if self.geometry is None or form is None:
            return None
        rows, columns = self._grid()
        tokens = config.geometry_tokens
        if form != "qformer" or config.stored_geometry == "every":
            self._cells()  # named before the first step where they do not fit
        made = build_compressor(
            form,
            self.geometry.channels,
            self.semantic.width,
            layers=config.head.layers,
            tokens=tokens,
            heads=config.qformer_heads,
        )
        if config.compressor != "control":
            return made
        seen = rows * columns * len(self.contract.cameras) if form == "qformer" else tokens
        return Control(made, seen, self.geometry.channels)


def _check(config: QwenGeometryConfig, contract: PolicyContract) -> None:
    if contract.family != QwenGeometry.family:
        raise ConfigError(f"the contract is of the family {contract.family!r}, not 'qwen_geometry'")
    sizes = {(camera.height, camera.width) for camera in contract.cameras}
    if len(sizes) != 1:
        raise ConfigError(
            f"qwen_geometry needs one image size for all cameras, the contract has {sorted(sizes)}",
            field="cameras",
        )
    if not contract.needs_language:
        raise ConfigError(
            "qwen_geometry is told its task by an instruction; set contract.needs_language: true",
            field="contract.needs_language",
        )
    history = contract.history
    if (history.frames, history.states) != (1, 1):
        raise ConfigError(
            f"qwen_geometry sees one frame and one state, the contract's history has "
            f"{history.frames} and {history.states}",
            field="contract.history",
        )
    if contract.action.horizon > config.head.positions:
        raise ConfigError(
            f"contract.horizon is {contract.action.horizon}, but the head has positions for "
            f"{config.head.positions} steps; set policy.head.positions or contract.horizon",
            field="policy.head.positions",
        )
