"""The trained part: context tokens of every stream, and a decoder of learned action queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reflexarc.policy.interface import Tensors
from reflexarc.policy.layers.fourier import FourierFeatures
from reflexarc.policy.layers.keypoints import KeypointTokens
from reflexarc.policy.vjepa2_head.config import VJEPA2HeadConfig

_EMBEDDING_STD = 0.02


class ProprioceptionEncoder(nn.Module):
    """``(B, P, S)`` normalised states to ``(B, 256)``: all steps beside each other."""

    def __init__(self, config: VJEPA2HeadConfig, *, steps: int, state: int) -> None:
        super().__init__()
        first, second = config.proprioception_hidden
        self.waves = FourierFeatures(config.state_octaves)
        inputs = steps * state * (1 + 2 * config.state_octaves)
        self.layers = nn.Sequential(nn.Linear(inputs, first), nn.GELU(), nn.Linear(first, second))

    def forward(self, states: Tensor) -> Tensor:
        encoded: Tensor = self.layers(self.waves(states).flatten(1))
        return encoded


class Context(nn.Module):
    """Streams side by side as tokens: cameras, goal image, proprioception, instruction.

    Args:
        channels: of a video or goal token.
        cameras: V.
        goal, language: which of the two the task is told by; both is possible.
    """

    def __init__(
        self, config: VJEPA2HeadConfig, *, channels: int, cameras: int, goal: bool, language: bool
    ) -> None:
        super().__init__()
        d, encoded = config.hidden_dim, config.proprioception_hidden[1]
        self.proprioception_tokens = config.proprioception_tokens
        self.keypoints = (
            None
            if config.keypoints is None
            else KeypointStreams(
                config, channels=channels, cameras=cameras, goal=goal, language=language
            )
        )
        if self.keypoints is None:
            self.video = nn.ModuleList(_projection(channels, d) for _ in range(cameras))
            self.goal = _projection(channels, d) if goal else None
        self.language = _projection(config.language_dimension, d) if language else None
        wide = d * config.proprioception_tokens
        self.proprioception = nn.Sequential(
            nn.Linear(encoded, wide), nn.LayerNorm(wide), nn.GELU()
        )  # fmt: skip
        # One a stream, in the order of the tokens.
        streams = cameras + goal + 1 + language
        self.modality = nn.Parameter(torch.randn(streams, d) * _EMBEDDING_STD)
        if self.keypoints is None:
            # Cameras and goal share it: the same place in the image is the same row.
            self.position = nn.Parameter(torch.randn(config.tokens, d) * _EMBEDDING_STD)

    def forward(self, streams: Tensors, proprioception: Tensor) -> Tensor:
        """``(B, L, hidden_dim)``.

        Args:
            streams: ``"video" (B, V, N, C)``, ``"goal" (B, N, C)``, ``"language" (B, E)``.
            proprioception: ``(B, 256)``.
        """
        told = None if self.language is None else self.language(streams["language"])
        see = self._grids if self.keypoints is None else self.keypoints
        images: list[Tensor] = see(streams, told)
        parts = [*images, self.proprioception(proprioception).unflatten(
            1, (self.proprioception_tokens, -1)
        )]  # fmt: skip
        if told is not None:
            parts.append(told[:, None])
        return torch.cat([part + kind for part, kind in zip(parts, self.modality, strict=True)], 1)

    def _grids(self, streams: Tensors, language: Tensor | None) -> list[Tensor]:
        images = [
            projection(tokens) + self.position
            for projection, tokens in zip(self.video, streams["video"].unbind(1), strict=True)
        ]
        if self.goal is not None:
            images.append(self.goal(streams["goal"]) + self.position)
        return images


class KeypointStreams(nn.Module):
    """Keypoints of the goal decide, with the instruction, what the cameras' look for."""

    def __init__(
        self, config: VJEPA2HeadConfig, *, channels: int, cameras: int, goal: bool, language: bool
    ) -> None:
        super().__init__()
        assert config.keypoints is not None
        d, points = config.hidden_dim, config.keypoints

        def keypoints(images: int, conditioned: bool) -> KeypointTokens:
            return KeypointTokens(
                d,
                cameras=images,
                grid=(config.grid_side, config.grid_side),
                channels=channels,
                keypoints=points.number,
                hidden=points.hidden,
                tokens=points.tokens,
                conditioned=conditioned,
                affine=False,
            )

        self.video = keypoints(cameras, True)
        self.goal = keypoints(1, False) if goal else None
        self.condition = nn.Linear(d * (points.tokens * goal + language), d)

    def forward(self, streams: Tensors, language: Tensor | None) -> list[Tensor]:
        """Tokens ``(B, tokens, hidden_dim)`` of each camera, then of the goal.

        Args:
            language: ``(B, hidden_dim)``.
        """
        goal = None
        told = [] if language is None else [language]
        if self.goal is not None:
            goal = self.goal(streams["goal"][:, None], None)[:, 0]
            told.insert(0, goal.flatten(1))
        seen = self.video(streams["video"], self.condition(torch.cat(told, dim=1)))
        return [*seen.unbind(1), *([] if goal is None else [goal])]


class ActionDecoder(nn.Module):
    """Learned queries, one an action, attend to each other and to the context.

    Pre-norm layers with GELU, then a norm and two linear layers: ``(B, horizon, actions)``.
    """

    def __init__(self, config: VJEPA2HeadConfig, *, horizon: int, actions: int) -> None:
        super().__init__()
        d = config.hidden_dim
        self.queries = nn.Parameter(torch.randn(horizon, d) * _EMBEDDING_STD)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                d,
                config.num_heads,
                config.feed_forward,
                config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(d)
        self.out = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, actions))

    def forward(self, context: Tensor) -> Tensor:
        """``(B, L, hidden_dim)`` to ``(B, horizon, actions)``."""
        hidden = self.queries.expand(len(context), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, context)
        actions: Tensor = self.out(self.norm(hidden))
        return actions


def _projection(inputs: int, d: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, d), nn.LayerNorm(d))
