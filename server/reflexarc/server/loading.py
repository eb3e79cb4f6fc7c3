"""A checkpoint's folder as something to serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflexarc.contract import ActionChunk, Observation, PolicyContract

if TYPE_CHECKING:
    from reflexarc.policy.checkpoint import LoadedPolicy


def verify_checkpoint(directory: Path) -> PolicyContract:
    """Check the folder and the sha256 of every file in it, without building the policy.

    Quick, so that a wrong folder is refused before a port is open. Raises CheckpointError.
    """
    from reflexarc.policy import checkpoint_files

    folder = checkpoint_files.resolve_checkpoint(directory)
    manifest, fingerprint = checkpoint_files.read_manifest(folder)
    checkpoint_files.read_files(folder, manifest)
    return manifest.contract.model_copy(update={"checkpoint_fingerprint": fingerprint})


class CheckpointPolicy:
    """A loaded checkpoint behind the :class:`~reflexarc.server.inference.Inference` protocol."""

    def __init__(self, loaded: LoadedPolicy, *, denoising_steps: int | None = None) -> None:
        from reflexarc.policy.runtime import PolicyRuntime

        self._runtime = PolicyRuntime(loaded, denoising_steps=denoising_steps)
        sampling = loaded.policy.sampling
        self._sampling = {
            "noise_shape": list(sampling.noise_shape) if sampling.noise_shape else None,
            "denoising_steps": self._runtime.default_steps,
            "supports_prefix": sampling.supports_prefix,
            "device": str(loaded.policy.device),
        }

    @classmethod
    def load(
        cls, directory: Path, device: str = "auto", *, denoising_steps: int | None = None
    ) -> CheckpointPolicy:
        """Load and place on ``device``; raises what ``load_checkpoint`` raises."""
        from reflexarc.policy.checkpoint import load_checkpoint

        return cls(load_checkpoint(directory, device), denoising_steps=denoising_steps)

    @property
    def contract(self) -> PolicyContract:
        return self._runtime.contract

    @property
    def sampling(self) -> Mapping[str, Any]:
        return self._sampling

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return self._runtime.infer(observations)
