"""Find out what started this process, and join the others where there are some."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.devices import resolve_device
from reflexarc.training.config import Recipe
from reflexarc.training.distributed.accelerate_settings import (
    check_processes_asked_for,
    check_settings,
    deepspeed_config_asked_for,
    device_asked_for,
    engine_asked_for,
)
from reflexarc.training.distributed.engine import Engine

ENGINES = ("auto", "ddp", "fsdp2", "zero2", "deepspeed")
_HOST = "gloo"


def processes_started() -> int:
    """How many processes torchrun or ``accelerate launch`` started; 1 where neither did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(
    engine: str = "auto", device: str = "auto", *, deepspeed_config: Path | None = None
) -> Engine:
    """The engine of this process, which has joined the others when there are some.

    Args:
        engine: one of :data:`ENGINES`; ``auto`` is what ``accelerate launch`` was told, else ddp.
        device: as ``--device`` names it. Each process of a machine takes a GPU of its own.
        deepspeed_config: a JSON file for the engine ``deepspeed``; the packaged one without.

    Raises ConfigError when the engine cannot run here, or contradicts what started this process.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f"--engine is {engine!r}; it is one of {', '.join(ENGINES)}", field="engine"
        )
    check_processes_asked_for()
    device = device_asked_for(device)
    chosen = _chosen(engine)
    if deepspeed_config is not None and chosen != "deepspeed":
        raise ConfigError("--deepspeed-config is for --engine deepspeed", field="deepspeed_config")
    if processes_started() == 1:
        if engine in ("fsdp2", "zero2", "deepspeed"):
            raise ConfigError(
                f"--engine {engine} divides a run over several processes, and this is one alone; "
                "start it with torchrun --nproc-per-node N -m reflexarc.cli train ...",
                field="engine",
            )
        return Engine(resolve_device(device))
    if chosen == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            "--engine deepspeed needs the package deepspeed: pip install 'reflexarc[deepspeed]'; "
            "--engine zero2 divides gradients and moments likewise, with torch alone",
            field="engine",
        )
    here = _join(device)
    if chosen == "deepspeed":
        from reflexarc.training.distributed.deepspeed_engine import DeepSpeedZeroTwo

        return DeepSpeedZeroTwo(here, deepspeed_config or deepspeed_config_asked_for())
    if chosen != "ddp":
        from reflexarc.training.distributed.sharded import DividedGradients, FullySharded

        return FullySharded(here) if chosen == "fsdp2" else DividedGradients(here)
    from reflexarc.training.distributed.processes import DataParallel

    return DataParallel(here)


def check_recipe(engine: Engine, recipe: Recipe) -> None:
    """Raise ConfigError when ``engine``, or what started this process, contradicts the recipe."""
    check_settings(recipe)
    engine.check(recipe)


def check_devices(processes: int, devices: int) -> None:
    """Raise ConfigError when a machine has more ``processes`` than GPUs."""
    if processes > devices:
        raise ConfigError(
            f"{processes} processes were started on a machine with {devices} GPUs, and each needs "
            f"its own; start it with --nproc-per-node {max(1, devices)}, or give --device cpu",
            field="device",
        )


def processes_here() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def threads_of_each(cores: int) -> int:
    """CPU threads for each of the processes on this machine."""
    return max(1, cores // processes_here())


def _chosen(engine: str) -> str:
    asked_for = engine_asked_for()
    if engine == "auto":
        return asked_for or "ddp"
    if asked_for not in (None, engine):
        raise ConfigError(
            f"--engine is {engine}, and accelerate launch was told {asked_for}; leave out --engine",
            field="engine",
        )
    return engine


def _join(device: str) -> torch.device:
    """Join the process group through accelerate, which knows the launchers; this one's device."""
    from accelerate import PartialState

    on_cpu = resolve_device(device).type != "cuda"
    if device == "mps":
        raise ConfigError("several processes train on CPUs or on CUDA, not on mps", field="device")
    if ":" in device:
        raise ConfigError(
            f"--device {device} is one device, and each process needs its own; give --device cuda",
            field="device",
        )
    if not on_cpu:
        check_devices(processes_here(), torch.cuda.device_count())
    state = PartialState(cpu=True, backend=_HOST) if on_cpu else PartialState()
    here: torch.device = state.device
    return here
