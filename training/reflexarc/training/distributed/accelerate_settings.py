"""What ``accelerate launch`` was told: it is followed, or refused where the recipe says other.

The launcher speaks through environment variables. It sets some whether a person chose them or
not (``mixed_precision`` is ``no``): such a default asks for nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import Recipe

_NOTHING = {"", "no", "none", "false", "0", "auto"}
_OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_BLOCKS = "weights are divided by the policy's own blocks"
_REFUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "nothing is compiled by it here; give --dynamo_backend no",
    "ACCELERATE_USE_MEGATRON_LM": "give --engine ddp, fsdp2, zero2 or deepspeed",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "samples alone are divided; leave it out",
}
_FSDP_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "weights stay on their device",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": f"{_BLOCKS}; leave it out",
    "FSDP_IGNORED_MODULES": "everything that is trained is divided; leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activations stay on their device",
}
_DEEPSPEED_REFUSED = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "moments stay on their device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "weights stay on their device",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "ZeRO-3 is --engine fsdp2",
}


def engine_asked_for() -> str | None:
    """``fsdp2``, ``zero2`` or ``deepspeed`` where accelerate was told so; else None.

    Raises ConfigError where it was told what no engine does.
    """
    _refuse(_REFUSED)
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        _refuse(_DEEPSPEED_REFUSED)
        stage = _asked("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if stage not in (None, "2"):
            raise _error(
                "ACCELERATE_DEEPSPEED_ZERO_STAGE", f"is {stage}; the engine deepspeed is ZeRO-2"
            )
        return "deepspeed"
    if not _asked("ACCELERATE_USE_FSDP"):
        return None
    if _asked("FSDP_VERSION") != "2":
        raise _error(
            "FSDP_VERSION", f"is {os.environ.get('FSDP_VERSION', '1')}; give --fsdp_version 2"
        )
    _refuse(_FSDP_REFUSED)
    wrap = _asked("FSDP_AUTO_WRAP_POLICY")
    if wrap not in (None, "TRANSFORMER_BASED_WRAP"):
        raise _error("FSDP_AUTO_WRAP_POLICY", f"is {wrap}, and {_BLOCKS}; leave it out")
    # Version 2 knows the old strategies by whether weights are given back after the forward pass.
    return "fsdp2" if _asked("FSDP_RESHARD_AFTER_FORWARD") else "zero2"


def deepspeed_config_asked_for() -> Path | None:
    """The file that accelerate was given for DeepSpeed."""
    path = _asked("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return None if path is None else Path(path)


def device_asked_for(device: str) -> str:
    """``device`` as ``--device`` names it, ``cpu`` where accelerate was told to leave GPUs alone.

    Raises ConfigError when the two contradict each other.
    """
    if not _asked("ACCELERATE_USE_CPU"):
        return device
    if device not in ("auto", "cpu"):
        raise _error("ACCELERATE_USE_CPU", f"is set, and --device is {device}; give one of them")
    return "cpu"


def check_processes_asked_for() -> None:
    """Raise ConfigError when another launcher wanted several processes and this would be one."""
    if "WORLD_SIZE" in os.environ:
        return
    several = {name: os.environ.get(name, "1") for name in _OTHER_LAUNCHERS}
    for name, value in several.items():
        if value.isdigit() and int(value) > 1:
            raise ConfigError(
                f"{name} is {value}: mpirun started this process, which cannot join the others; "
                f"start it with torchrun --nproc-per-node {value} -m reflexarc.cli train ...",
                field=name,
            )
    if _asked("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu starts one process, whatever its --num_processes says; on "
            "CPUs start several with torchrun --nproc-per-node N -m reflexarc.cli train ...",
            field="ACCELERATE_USE_CPU",
        )


def check_settings(recipe: Recipe) -> None:
    """Raise ConfigError where accelerate was told other than the recipe says."""
    loop, optimizer = recipe.training, recipe.optimizer
    precision = _asked("ACCELERATE_MIXED_PRECISION")
    if precision not in (None, loop.precision):
        raise _error(
            "ACCELERATE_MIXED_PRECISION",
            f"is {precision}, and training.precision {loop.precision}; the recipe decides: leave "
            f"out --mixed_precision, or give --set training.precision={precision}",
        )
    passes = _asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if passes not in (None, "1", str(loop.accumulate)):
        raise _error(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            f"is {passes}, and training.accumulate {loop.accumulate}; the recipe decides: give "
            f"--set training.accumulate={passes}",
        )
    clip = _asked("ACCELERATE_GRADIENT_CLIPPING")
    if clip is not None and float(clip) != optimizer.gradient_clip:
        raise _error(
            "ACCELERATE_GRADIENT_CLIPPING",
            f"is {clip}, and optimizer.gradient_clip {optimizer.gradient_clip}; the recipe "
            f"decides: give --set optimizer.gradient_clip={clip}",
        )
    if _asked("FSDP_ACTIVATION_CHECKPOINTING") and not loop.activation_checkpointing:
        raise _error(
            "FSDP_ACTIVATION_CHECKPOINTING",
            "is true, and training.activation_checkpointing false; the recipe decides: give "
            "--set training.activation_checkpointing=true",
        )


def _asked(name: str) -> str | None:
    """The value of a variable that asks for something; None where it does not."""
    value = os.environ.get(name, "")
    return None if value.lower() in _NOTHING else value


def _refuse(names: dict[str, str]) -> None:
    for name, why in names.items():
        if (value := _asked(name)) is not None:
            raise _error(name, f"is {value}: {why}")


def _error(name: str, what: str) -> ConfigError:
    return ConfigError(f"accelerate launch set {name}, which {what}", field=name)
