"""What each replica builds, as plain data that travels to its process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.server.inference import Inference


@dataclass(frozen=True)
class ReplicaSource:
    """The options of ``serve-policy`` that say what is served; see :mod:`reflexarc.server.sources`.

    Attributes:
        checkpoint: absolute path of the folder, the same on every machine; None without one.
        policy: a class or an entry point's name.
        search: a directory whose modules ``policy`` may name.
        config: of a plain class.
        contract: of ``random`` and ``zero``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``; which GPU is Ray's to say.
        threads: of torch.
    """

    checkpoint: Path | None = None
    policy: str | None = None
    search: Path | None = None
    config: Path | None = None
    contract: Path | None = None
    device: str = "auto"
    denoising_steps: int | None = None
    max_batch: int | None = None
    compile_mode: str = "auto"
    threads: int | None = None
    precision: str = "fp32"

    def build(self) -> Inference:
        """Load it, on this machine. Raises what the loading raises."""
        from reflexarc.server.sources import checkpoint_source, policy_source

        if self.checkpoint is None:
            assert self.policy is not None
            return policy_source(
                self.policy, config=self.config, contract=self.contract, search=self.search
            ).load()
        from reflexarc.policy.threads import use_threads

        use_threads(self.threads)
        return checkpoint_source(
            self.checkpoint,
            policy=self.policy,
            search=self.search,
            device=self.device,
            denoising_steps=self.denoising_steps,
            max_batch=self.max_batch,
            compile_mode=self.compile_mode,
            precision=self.precision,
        ).load()

    def check(self) -> PolicyContract | None:
        """Refuse here what every replica would refuse; the contract where it is known so early.

        Imports no torch: the ingress needs none. Raises CheckpointError, ConfigError,
        DoesNotFitError.
        """
        if ":" in self.device:
            raise ConfigError(
                f"--device {self.device}: Ray gives each replica its own GPU; say cuda or cpu",
                field="device",
            )
        if self.checkpoint is None:
            return None
        from reflexarc.server.loading import verify_checkpoint

        return verify_checkpoint(self.checkpoint)
