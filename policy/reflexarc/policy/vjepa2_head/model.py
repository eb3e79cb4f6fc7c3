"""The V-JEPA 2 policy head behind the :class:`Policy` interface.

A frozen encoder turns the clip of a decision into 64 tokens a camera, once a decision, and the
goal image into 64 tokens, once an episode; with proprioception they are the context of a
transformer decoder whose learned queries are the chunk of actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError, ContractViolationError
from reflexarc.policy.backbones.clip_encoder import build_clip_encoder
from reflexarc.policy.interface import (
    FrozenBackbone,
    Policy,
    PolicyConfig,
    SamplingSpec,
    Task,
    Tensors,
)
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.vjepa2_head.config import VJEPA2HeadConfig
from reflexarc.policy.vjepa2_head.network import ActionDecoder, Context, ProprioceptionEncoder

OPEN, CLOSED = -1.0, 1.0


class VJEPA2Head(Policy):
    """See the module. N below is the number of a camera's tokens, C that of their channels."""

    family = "vjepa2_head"
    config_class = VJEPA2HeadConfig
    config: VJEPA2HeadConfig
    embeds_clips = True

    def __init__(
        self,
        config: VJEPA2HeadConfig,
        contract: PolicyContract,
        language: LanguageEmbeddings | None,
    ) -> None:
        super().__init__()
        _check(config, contract, language)
        self.config = config
        self.contract = contract
        self.language = language
        self.sampling = SamplingSpec(noise_shape=None)
        self.clips = build_clip_encoder(config.clips, config.grid_side)
        for camera in contract.cameras:
            self.clips.check_clip(camera.height, camera.width, contract.history.frames)
        self.proprioception = ProprioceptionEncoder(
            config, steps=contract.history.states, state=contract.state.dimension
        )
        self.context = Context(
            config,
            channels=self.clips.channels,
            cameras=len(contract.cameras),
            goal=contract.needs_goal_image,
            language=contract.needs_language,
        )
        action = contract.action
        self.decoder = ActionDecoder(config, horizon=action.horizon, actions=action.dimension)

    @classmethod
    def build(
        cls, config: PolicyConfig, contract: PolicyContract, extra_files: Mapping[str, bytes]
    ) -> VJEPA2Head:
        if not isinstance(config, VJEPA2HeadConfig):
            raise ConfigError(f"VJEPA2Head needs a VJEPA2HeadConfig, got {type(config).__name__}")
        language = LanguageEmbeddings.from_files(extra_files) if contract.needs_language else None
        return cls(config, contract, language)

    def extra_files(self) -> Mapping[str, bytes]:
        return {} if self.language is None else self.language.to_files()

    def frozen_backbones(self) -> Mapping[str, FrozenBackbone]:
        return {
            f"clips.{path}" if path else "clips": identity
            for path, identity in self.clips.identities.items()
        }

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.decoder.layers)

    def component_parameters(self) -> Mapping[str, int]:
        return {
            name: sum(p.numel() for p in getattr(self, name).parameters())
            for name in ("proprioception", "context", "decoder")
        }

    def embed_task(self, tasks: Sequence[Task]) -> Tensors:
        """``"goal" (N, tokens, C)`` and ``"language" (N, E)``, float32, as the contract needs."""
        rows: Tensors = {}
        if self.contract.needs_goal_image:
            rows["goal"] = self._goal_tokens(tasks)
        if self.language is not None:
            vectors = self.language.lookup([task.instruction for task in tasks])
            rows["language"] = vectors.to(self.device)
        return rows

    def embed_frames(self, frames: Tensors, task: Tensors) -> Tensors:
        """``"frames" (N, V, ...)``: pixels for a video encoder, else the tokens of each frame."""
        images = torch.stack([frames[name] for name in self.contract.camera_names], dim=1)
        rows = self.clips.frame_rows(images.flatten(0, 1))
        return {"frames": rows.view(*images.shape[:2], *rows.shape[1:])}

    def embed_clips(self, clips: Tensors, valid: Tensor) -> Tensors:
        """``"clip" (N, V, tokens, C)`` float32 from ``"frames" (N, F, V, ...)``."""
        rows = clips["frames"].transpose(1, 2)
        tokens = self.clips.clip_tokens(rows.flatten(0, 1))
        return {"clip": tokens.view(*rows.shape[:2], *tokens.shape[1:])}

    def stored_clips(self, clips: Tensors, valid: Tensor) -> Tensors:
        """With ``static_clips`` there stands beside it ``"static"``: the newest frame, held."""
        stored = self.embed_clips(clips, valid)
        if self.config.static_clips:
            rows = clips["frames"]
            still = {"frames": rows[:, -1:].expand_as(rows)}
            stored["static"] = self.embed_clips(still, valid)["clip"]
        return stored

    def encode(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensors:
        """``{"tokens": (B, L, hidden_dim)}``: cameras, goal, proprioception, instruction."""
        return self.encode_streams(self.streams(task, window))

    def streams(self, task: Tensors, window: Tensors) -> Tensors:
        """What the context is made of, tokens normalised where the config says so.

        ``"video" (B, V, N, C)``, ``"goal" (B, N, C)``, ``"language" (B, E)``, ``"state"
        (B, P, S)``. An objective may add noise before it calls :meth:`encode_streams`.
        """
        streams = {
            "video": self._normalized(window["clip"][:, -1]),
            "state": window["state"][:, -self.contract.history.states :],
        }
        if self.contract.needs_goal_image:
            streams["goal"] = self._normalized(task["goal"])
        if self.contract.needs_language:
            streams["language"] = task["language"]
        return streams

    def encode_streams(self, streams: Tensors) -> Tensors:
        """:meth:`encode`, from :meth:`streams` on."""
        return {"tokens": self.context(streams, self.proprioception(streams["state"]))}

    def predict(self, context: Tensors) -> Tensor:
        """Normalised actions ``(B, H, D)``; the gripper's column is a logit of "closed", or with
        ``gripper: tanh`` what comes before the tanh.
        """
        predicted: Tensor = self.decoder(context["tokens"])
        return predicted

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
        predicted = self.predict(context).float()
        gripper = self.contract.action.gripper
        if gripper is None:
            return predicted
        column = predicted[..., gripper.index]
        if self.config.gripper == "tanh":
            command = column.tanh()
        else:
            command = torch.where(column > 0, CLOSED, OPEN).to(column.dtype)
        parts = [predicted[..., : gripper.index], command.unsqueeze(-1)]
        return torch.cat([*parts, predicted[..., gripper.index + 1 :]], dim=-1)

    def _goal_tokens(self, tasks: Sequence[Task]) -> Tensor:
        """Of the first camera's image, as a clip of one frame."""
        name = self.contract.camera_names[0]
        images = []
        for task in tasks:
            if task.goal_image is None or name not in task.goal_image:
                raise ContractViolationError(
                    f"this policy needs a goal image of the camera {name!r}, none came; send one "
                    "with the first request of an episode",
                    field="goal_image",
                )
            images.append(task.goal_image[name])
        rows = self.clips.frame_rows(torch.stack(images))
        return self.clips.clip_tokens(rows.unsqueeze(1))

    def _normalized(self, tokens: Tensor) -> Tensor:
        tokens = tokens.float()  # rows of a task may be stored in half precision
        return F.normalize(tokens, dim=-1) if self.config.normalize else tokens


def _check(
    config: VJEPA2HeadConfig, contract: PolicyContract, language: LanguageEmbeddings | None
) -> None:
    if contract.family != VJEPA2Head.family:
        raise ConfigError(f"the contract is of the family {contract.family!r}, not 'vjepa2_head'")
    if not contract.cameras:
        raise ConfigError("vjepa2_head needs a camera; the contract has none", field="cameras")
    if not (contract.needs_goal_image or contract.needs_language):
        raise ConfigError(
            "nothing tells vjepa2_head its task: set contract.needs_goal_image, "
            "contract.needs_language, or both",
            field="contract.needs_goal_image",
        )
    if language is not None and language.dimension != config.language_dimension:
        raise ConfigError(
            f"language_dimension is {config.language_dimension}, but the embeddings of "
            f"{language.encoder} have {language.dimension}",
            field="language_dimension",
        )
