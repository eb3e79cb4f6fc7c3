"""Mobile VLA behind the :class:`Policy` interface.

Each frame of the window goes through the backbone by itself, together with the instruction, and
becomes one feature; an LSTM reads the features in order and gives, after each of them, the
velocities of the next steps. The newest of these chunks is executed; training learns from all.

Features of frames are what a session keeps, so that a decision costs its new frames alone. The LSTM
reads the window again at every decision: a state carried along would have seen more than a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import (
    FrozenBackbone,
    Policy,
    PolicyConfig,
    SamplingSpec,
    Task,
    Tensors,
)
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.mobile_vla.backbone import build_backbone
from reflexarc.policy.mobile_vla.config import CompactConfig, MobileVLAConfig

_CELL_GAIN = 2.0
ADAPTERS = ("lora_", "action_token")
"""Parts of names of what is trained inside the frozen backbone."""


class MobileVLA(Policy):
    """See the module. F is the window's number of frames, D the width of a frame's feature."""

    family = "mobile_vla"
    config_class = MobileVLAConfig
    config: MobileVLAConfig

    def __init__(
        self,
        config: MobileVLAConfig,
        contract: PolicyContract,
        language: LanguageEmbeddings | None,
    ) -> None:
        super().__init__()
        _check(contract)
        self.config, self.contract = config, contract
        self.sampling = SamplingSpec(noise_shape=None)
        self.backbone = build_backbone(config.backbone, contract, language)
        layers = config.lstm_layers
        self.lstm = nn.LSTM(
            self.backbone.width,
            config.lstm_hidden,
            num_layers=layers,
            batch_first=True,
            dropout=config.dropout if layers > 1 else 0.0,
        )
        _keep_signal(self.lstm)
        beside = self.backbone.width if config.head_sees_frame else 0
        self.head = _perceptron(
            (config.lstm_hidden + beside, *config.head_hidden),
            contract.action.horizon * contract.action.dimension,
        )

    @classmethod
    def reads_instructions(cls, config: PolicyConfig) -> bool:
        return isinstance(config, MobileVLAConfig) and not isinstance(
            config.backbone, CompactConfig
        )

    @classmethod
    def build(
        cls, config: PolicyConfig, contract: PolicyContract, extra_files: Mapping[str, bytes]
    ) -> MobileVLA:
        if not isinstance(config, MobileVLAConfig):
            raise ConfigError(f"MobileVLA needs a MobileVLAConfig, got {type(config).__name__}")
        language = None
        if contract.needs_language and not cls.reads_instructions(config):
            language = LanguageEmbeddings.from_files(extra_files)
        return cls(config, contract, language)

    def extra_files(self) -> Mapping[str, bytes]:
        language = self.backbone.language
        return {} if language is None else language.to_files()

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        return {f"backbone.{path}": one for path, one in self.backbone.identities.items()}

    def stored_backbones(self) -> Mapping[str, FrozenBackbone]:
        """The images' encoder alone: what the store holds has seen no instruction."""
        return {"backbone.vision": self.backbone.identities["vision"]}

    def is_trained(self, name: str) -> bool:
        return super().is_trained(name) or any(part in name for part in ADAPTERS)

    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.layers

    def component_parameters(self) -> Mapping[str, int]:
        """Of the backbone what is trained: adapters and action token, or all but its encoder."""
        counts = {name: sum(p.numel() for p in getattr(self, name).parameters())
                  for name in ("lstm", "head")}  # fmt: skip
        trained = sum(
            p.numel()
            for name, p in self.named_parameters()
            if name.startswith("backbone.") and self.is_trained(name)
        )
        return {"backbone": trained, **counts}

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        """As the backbone tells instructions: tokens and their number, or embeddings."""
        rows = self.backbone.embed_instructions([task.instruction for task in tasks])
        return {name: values.to(self.device) for name, values in rows.items()}

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        """``{"image": (N, tokens, C)}`` of the frozen encoder."""
        (name,) = self.contract.camera_names
        return {"image": self.backbone.image_rows(frames[name])}

    def kept_frames(self, rows: Tensors, task: Tensors) -> Tensors:
        """``{"feature": float32 (N, D)}``: all that a frame comes to, so that it is read once."""
        return {"feature": self.backbone.action_features(rows["image"], task)}

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        """``{"hidden": (B, F, W)}``, what the perceptron sees, from either kind of rows.

        Before an episode's first frame that frame is repeated, in training as in serving.
        """
        features = self._features(task, window)
        hidden, _ = self.lstm(features)
        if self.config.head_sees_frame:
            hidden = torch.cat([hidden, features], dim=-1)
        return {"hidden": hidden}

    def predict(self, context: Tensors) -> Tensor:
        """Normalised velocities ``(B, F, H, 2)``: a chunk that follows each frame of the window."""
        action = self.contract.action
        predicted: Tensor = self.head(context["hidden"])
        return predicted.view(*predicted.shape[:-1], action.horizon, action.dimension)

    def sample_actions(
        self,
        context: Tensors,
        noise: Tensor | None,
        *,
        steps: int,
        prefix: Tensor | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        if prefix is not None or guide is not None:
            raise ConfigError("this policy regresses whole chunks and takes no committed actions")
        newest = {"hidden": context["hidden"][:, -1:]}
        return self.predict(newest)[:, 0].float()

    def _features(self, task: Tensors, window: Tensors) -> Tensor:
        if "feature" in window:
            return window["feature"]
        images = window["image"]
        batch, length = images.shape[:2]
        told = {name: rows.repeat_interleave(length, 0) for name, rows in task.items()}
        features = self.backbone.action_features(images.flatten(0, 1), told)
        return features.view(batch, length, -1)


@torch.no_grad()
def _keep_signal(lstm: nn.LSTM) -> None:
    """Begin with gates that let the input through, so that all layers learn from the first step.

    As torch begins them, a layer's output is about a fifth as large as its input: of four layers
    nothing comes out, nor does a gradient come back.
    """
    for layer in range(lstm.num_layers):
        weight: Tensor = getattr(lstm, f"weight_ih_l{layer}")
        # Rows are the input, forget, cell and output gates.
        cell = weight[2 * lstm.hidden_size : 3 * lstm.hidden_size]
        nn.init.orthogonal_(cell, gain=_CELL_GAIN)
        bias: Tensor = getattr(lstm, f"bias_ih_l{layer}")
        for gate in (0, 3):  # open: input and output
            bias[gate * lstm.hidden_size : (gate + 1) * lstm.hidden_size] += 1.0


def _perceptron(widths: Sequence[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _check(contract: PolicyContract) -> None:
    if contract.family != MobileVLA.family:
        raise ConfigError(f"the contract is of the family {contract.family!r}, not 'mobile_vla'")
    if len(contract.cameras) != 1:
        raise ConfigError(
            f"mobile_vla sees one camera, the contract has {len(contract.cameras)}",
            field="cameras",
        )
    if contract.action.gripper is not None:
        raise ConfigError("mobile_vla drives and has no gripper", field="action.gripper")
    if not contract.needs_language:
        raise ConfigError(
            "mobile_vla is told where to go: set contract.needs_language: true",
            field="contract.needs_language",
        )
    if contract.needs_goal_image:
        raise ConfigError(
            "mobile_vla takes no goal image: set contract.needs_goal_image: false",
            field="contract.needs_goal_image",
        )
