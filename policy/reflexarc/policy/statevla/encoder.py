"""StateVLA's encoder: one token sequence of all modalities, read by a causal Mamba."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reflexarc.policy.interface import Tensors
from reflexarc.policy.layers.fourier import FourierFeatures
from reflexarc.policy.layers.keypoints import KeypointTokens
from reflexarc.policy.layers.mamba import MambaStack
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.vision_tokens import PatchTokens

_EMBEDDING_STD = 0.02


class Tokenizer(nn.Module):
    """Project each modality to ``d_model`` and lay the tokens in a row.

    The order is language, state, one camera's tokens after the other, latent tokens. Mamba is
    causal: language first conditions how images are read, and latent tokens last see everything.
    """

    def __init__(
        self,
        config: StateVLAConfig,
        *,
        state: int,
        cameras: int,
        grid: tuple[int, int],
        channels: int,
        patches: nn.Module | None = None,
    ):
        super().__init__()
        d = config.d_model
        # Sentence embeddings have unit norm: without a norm of its own the instruction would
        # enter twenty times smaller than everything else.
        self.language_norm = nn.LayerNorm(config.language_dimension)
        self.language = nn.Linear(config.language_dimension, d)
        waves = config.state_octaves
        self.waves = FourierFeatures(waves)
        self.state = nn.Sequential(
            nn.Linear(state * (1 + 2 * waves), config.state_hidden),
            nn.GELU(),
            nn.Linear(config.state_hidden, d),
        )
        self.patches = patches
        self.vision = _vision_tokens(config, cameras=cameras, grid=grid, channels=channels)
        # Modalities: language, state, then the cameras.
        self.modality = nn.Parameter(torch.randn(2 + cameras, d) * _EMBEDDING_STD)
        self.latent = nn.Parameter(torch.randn(config.latent_tokens, d) * _EMBEDDING_STD)

    @property
    def uses_language(self) -> bool:
        """Whether the instruction changes more tokens than its own, as it does with keypoints."""
        return bool(self.vision.uses_language)

    def forward(
        self, language: Tensor, state: Tensor, vision: Tensor, *, without_language: bool = False
    ) -> Tensor:
        """``(B, E)``, ``(B, S)`` and ``(B, V, P, C)`` to tokens ``(B, 2 + V·N + K, d_model)``.

        N is the number of a camera's tokens. ``vision`` holds what ``patches`` takes, where there
        is one: pixels ``(B, V, H, W, 3)``. With
        ``without_language`` no token but its own depends on the language.
        """
        if self.patches is not None:
            vision = self.patches(vision)
        instruction = self.language(self.language_norm(language))
        heard = None if without_language else instruction
        seen = self.vision(vision, heard) + self.modality[2:, None]
        tokens = [
            (instruction + self.modality[0])[:, None],
            (self.state(self.waves(state)) + self.modality[1])[:, None],
            seen.flatten(1, 2),
            self.latent.expand(len(language), -1, -1),
        ]
        return torch.cat(tokens, dim=1)


def _vision_tokens(
    config: StateVLAConfig, *, cameras: int, grid: tuple[int, int], channels: int
) -> nn.Module:
    keypoints = config.keypoints
    if keypoints is None:
        patches = grid[0] * grid[1]
        return PatchTokens(config.d_model, cameras=cameras, patches=patches, channels=channels)
    return KeypointTokens(
        config.d_model,
        cameras=cameras,
        grid=grid,
        channels=channels,
        keypoints=keypoints.number,
        hidden=keypoints.hidden,
        tokens=keypoints.tokens,
    )


class Encoder(nn.Module):
    """Tokens ``(B, L, d_model)`` to ``z (B, K, d_model)``, the outputs of the latent tokens."""

    def __init__(self, config: StateVLAConfig):
        super().__init__()
        self.latent_tokens = config.latent_tokens
        self.stack = MambaStack(
            config.d_model,
            config.encoder_layers,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            bidirectional=config.bidirectional,
        )
        self.bidirectional = config.bidirectional
        self.projection = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        # Contiguous for the reason that Mamba gives.
        outputs = self.stack(tokens)[:, -self.latent_tokens :].contiguous()
        z: Tensor = self.norm(self.projection(outputs))
        return z

    def of_every_token(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``(B, L, d_model)`` to the same, each output projected and normed as z is.

        For objectives that compare single tokens; the last K rows of a whole sequence are z.
        ``lengths int64 (B,)`` says how many tokens of each row are real, padding follows them;
        the outputs at padding mean nothing.
        """
        # Padding stands behind all that a causal encoder sees.
        behind = lengths if self.bidirectional else None
        outputs: Tensor = self.norm(self.projection(self.stack(tokens, behind)))
        return outputs


class Representation(nn.Module):
    """All that turns frozen features, language and state into z.

    One module, so that a target network is one copy of everything that its branch uses.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder):
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder

    def forward(self, task: Tensors, window: Tensors, valid: Tensor) -> Tensor:
        """``z (B, K, d_model)`` from the newest row of the window; arguments as in ``encode``."""
        z: Tensor = self.encoder(self.tokens(task, window))
        return z

    def tokens(self, task: Tensors, window: Tensors, *, without_language: bool = False) -> Tensor:
        """What the encoder reads, ``(B, L, d_model)``; arguments as of :class:`Tokenizer`."""
        tokens: Tensor = self.tokenizer(
            task["language"],
            window["state"][:, -1],
            window["vision"][:, -1],
            without_language=without_language,
        )
        return tokens
