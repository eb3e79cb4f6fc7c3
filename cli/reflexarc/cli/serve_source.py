"""What ``reflexarc serve`` serves: a checkpoint, or a policy that is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reflexarc.cli.extras import require
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from reflexarc.server.sources import PolicySource


def of_checkpoint(
    checkpoint: Path,
    policy: str | None,
    policy_config: Path | None,
    contract: Path | None,
    device: str,
    denoising_steps: int | None,
    max_batch: int | None,
    compile_mode: str,
    threads: int | None,
    precision: str,
) -> PolicySource:
    """What ``--ckpt`` serves. ConfigError for options that do not go with it."""
    for option, given in (("--policy-config", policy_config), ("--contract", contract)):
        if given is not None:
            raise ConfigError(
                f"{option} does not go with --ckpt: a checkpoint holds its own", field=option
            )
    require("serve-policy --ckpt", "server", "safetensors", "torch")
    from reflexarc.policy.threads import use_threads
    from reflexarc.server.sources import checkpoint_source

    use_threads(threads)
    return checkpoint_source(
        checkpoint,
        policy=policy,
        search=Path.cwd(),
        device=device,
        denoising_steps=denoising_steps,
        max_batch=max_batch,
        compile_mode=compile_mode,
        precision=precision,
    )


def of_policy(
    policy: str | None,
    policy_config: Path | None,
    contract: Path | None,
    device: str,
    denoising_steps: int | None,
) -> PolicySource:
    """What ``--policy`` serves. ConfigError without it, or for options of checkpoints."""
    from reflexarc.server.sources import policy_source

    if policy is None:
        raise ConfigError(
            "nothing to serve: give --ckpt DIR, or --policy random, zero or module:Class",
            field="ckpt",
        )
    if device != "auto" or denoising_steps is not None:
        raise ConfigError(
            "--device and --denoising-steps are for checkpoints; a class of your own gets its "
            "settings with --policy-config",
            field="device" if device != "auto" else "denoising_steps",
        )
    return policy_source(policy, config=policy_config, contract=contract, search=Path.cwd())
