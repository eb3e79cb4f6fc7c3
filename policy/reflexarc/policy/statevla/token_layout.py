"""Which tokens of StateVLA's sequence belong to which modality."""

from __future__ import annotations

from dataclasses import dataclass

LANGUAGE, STATE = "language", "state"


@dataclass(frozen=True)
class TokenLayout:
    """The order of the sequence: language, state, one camera after the other, latent tokens.

    Attributes:
        cameras: their names, in order.
        camera_tokens: N, of each camera.
        grid: rows and columns of a camera's patches; None where its tokens are no patches.
        latent_tokens: K, at the end of the sequence.
        d_model: width of a token.
    """

    cameras: tuple[str, ...]
    camera_tokens: int
    grid: tuple[int, int] | None
    latent_tokens: int
    d_model: int

    @property
    def modalities(self) -> tuple[str, ...]:
        """``language``, ``state``, then the cameras."""
        return (LANGUAGE, STATE, *self.cameras)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each of ``modalities``."""
        return (1, 1, *(self.camera_tokens for _ in self.cameras))

    @property
    def inputs(self) -> int:
        """M, tokens of all modalities; the sequence has ``latent_tokens`` more."""
        return sum(self.sizes)

    def span(self, modality: str) -> slice:
        """Where a modality's tokens stand. ValueError for one that there is not."""
        place = self.modalities.index(modality)
        start = sum(self.sizes[:place])
        return slice(start, start + self.sizes[place])
