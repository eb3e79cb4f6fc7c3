"""A checkpoint's folder as something to serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reflexarc.contract import ActionChunk, Observation, PolicyContract, ReflexarcError
from reflexarc.contract.errors import CheckpointError, UnknownInstructionError

if TYPE_CHECKING:
    from reflexarc.policy.checkpoint import LoadedPolicy
    from reflexarc.policy.decisions import CompileMode
    from reflexarc.policy.half_precision import Precision
    from reflexarc.policy.interface import Policy

logger = logging.getLogger(__name__)
# On a CPU two rows take nearly twice as long as one: what a larger batch wins is lost in waiting.
_MAX_BATCH_CPU, _MAX_BATCH_ACCELERATOR = 4, 32


def verify_checkpoint(directory: Path, family: type[Policy] | None = None) -> PolicyContract:
    """Check the folder and the sha256 of every file in it, without building the policy.

    Quick, so that a wrong folder is refused before a port is open. Raises CheckpointError, also
    where the checkpoint is not one of ``family``.
    """
    from reflexarc.policy import checkpoint_files

    folder = checkpoint_files.resolve_checkpoint(directory)
    manifest, fingerprint = checkpoint_files.read_manifest(folder)
    if family is not None and manifest.family != family.family:
        raise CheckpointError(
            f"{folder} is of the family {manifest.family!r}, the class {family.__qualname__} is "
            f"{family.family!r}; leave out --policy, or name the checkpoint that it was saved in",
            field="family",
        )
    checkpoint_files.read_files(folder, manifest)
    return manifest.contract.model_copy(update={"checkpoint_fingerprint": fingerprint})


class CheckpointPolicy:
    """A loaded checkpoint behind the :class:`~reflexarc.server.inference.Inference` protocol.

    Attributes:
        max_batch: rows of the largest batch.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        *,
        denoising_steps: int | None = None,
        max_batch: int | None = None,
        compile_mode: CompileMode = "auto",
    ) -> None:
        from reflexarc.policy.runtime import PolicyRuntime

        self._runtime = PolicyRuntime(
            loaded, denoising_steps=denoising_steps, compile_mode=compile_mode
        )
        self._action_std = loaded.statistics.action.std
        self._known_instruction = known_instruction(loaded.policy)
        on_cpu = loaded.policy.device.type == "cpu"
        self.max_batch = max_batch or (_MAX_BATCH_CPU if on_cpu else _MAX_BATCH_ACCELERATOR)
        sampling = loaded.policy.sampling
        self._sampling = {
            "noise_shape": list(sampling.noise_shape) if sampling.noise_shape else None,
            "denoising_steps": self._runtime.default_steps,
            "supports_prefix": sampling.supports_prefix,
            "supports_guide": sampling.supports_guide,
            "device": str(loaded.policy.device),
        }

    @classmethod
    def load(
        cls,
        directory: Path,
        device: str = "auto",
        *,
        denoising_steps: int | None = None,
        max_batch: int | None = None,
        compile_mode: CompileMode = "auto",
        precision: Precision = "fp32",
    ) -> CheckpointPolicy:
        """Load and place on ``device``; raises what ``load_checkpoint`` raises."""
        from reflexarc.policy.checkpoint import load_checkpoint

        loaded = load_checkpoint(directory, device)
        if loaded.provenance.get("action_heads_trained") is False:
            logger.warning(
                "%s is a checkpoint of pre-training: its action heads are random, and so are its "
                "actions; train the next stage with --init-from %s",
                loaded.directory,
                loaded.directory,
            )
        if precision == "bf16":
            from reflexarc.policy.half_precision import serve_in_bf16

            serve_in_bf16(loaded.policy)
        return cls(
            loaded,
            denoising_steps=denoising_steps,
            max_batch=max_batch,
            compile_mode=compile_mode,
        )

    @property
    def contract(self) -> PolicyContract:
        return self._runtime.contract

    @property
    def sampling(self) -> Mapping[str, Any]:
        return self._sampling

    @property
    def action_std(self) -> Sequence[float]:
        return self._action_std

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        return self._runtime.infer(observations)

    def infer_in_parts(
        self, observations: Sequence[Observation]
    ) -> Iterator[list[tuple[int, ActionChunk | ReflexarcError]]]:
        """Chunks or errors by index, each group of equal denoising steps as it is sampled."""
        return self._runtime.infer_in_parts(observations)

    def end_session(self, session_id: str) -> bool:
        return self._runtime.end_session(session_id)

    def warm_up(self) -> None:
        """Infer on black images, once at each batch size in use: 1, 2, 4, ... and the largest.

        Allocators, autotuners and kernels are slow only the first time that they see a shape.

        Raises InferenceError when the policy's actions are not finite, as any request would.
        """
        started = time.perf_counter()
        try:
            blank = blank_observation(self.contract, self._known_instruction)
            for rows in batch_sizes(self.max_batch):
                self.infer([blank] * rows)
        except UnknownInstructionError:
            logger.info("not warmed up: the checkpoint names no instruction that it understands")
            return
        logger.info("warmed up in %.0f ms", (time.perf_counter() - started) * 1000)


def batch_sizes(largest: int) -> list[int]:
    """Powers of two up to ``largest``, and that."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def blank_observation(contract: PolicyContract, instruction: str | None) -> Observation:
    """Black images and a state of zeros at an episode's start, valid under the contract."""
    images = {
        camera.name: np.zeros((camera.height, camera.width, 3), np.uint8)
        for camera in contract.cameras
    }
    if instruction is None and contract.needs_language:
        instruction = "wait"  # some policies understand any text
    return Observation(
        images,
        np.zeros(contract.state.dimension),
        instruction,
        seed=0,
        step_index=0,
        goal_image=images if contract.needs_goal_image else None,
    )


def known_instruction(policy: Policy) -> str | None:
    """An instruction among the language embeddings in the checkpoint; None where it has none."""
    from reflexarc.policy.language import INDEX_FILE, LanguageEmbeddings

    files = policy.extra_files()
    return LanguageEmbeddings.from_files(files).instructions[0] if INDEX_FILE in files else None
