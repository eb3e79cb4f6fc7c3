"""Find out what started this process, and join the others where there are some."""

from __future__ import annotations

import os

import torch

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.devices import resolve_device
from reflexarc.training.distributed.engine import Engine

ENGINES = ("auto", "ddp", "fsdp2", "zero2")
_HOST = "gloo"


def processes_started() -> int:
    """How many processes torchrun or ``accelerate launch`` started; 1 where neither did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(engine: str = "auto", device: str = "auto") -> Engine:
    """The engine of this process, which has joined the others when there are some.

    Args:
        engine: ``ddp``, ``fsdp2``, ``zero2``, or ``auto``: what ``accelerate launch`` was told,
            else ddp.
        device: as ``--device`` names it. Each process of a machine takes a GPU of its own.

    Raises ConfigError when the engine cannot run here.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f"--engine is {engine!r}; it is one of {', '.join(ENGINES)}", field="engine"
        )
    if processes_started() == 1:
        if engine in ("fsdp2", "zero2"):
            raise ConfigError(
                f"--engine {engine} divides a run over several processes, and this is one alone; "
                "start it with torchrun --nproc-per-node N -m reflexarc.cli train ...",
                field="engine",
            )
        return Engine(resolve_device(device))
    chosen = _asked_of_accelerate() if engine == "auto" else engine
    here = _join(device)
    if chosen != "ddp":
        from reflexarc.training.distributed.sharded import DividedGradients, FullySharded

        return FullySharded(here) if chosen == "fsdp2" else DividedGradients(here)
    from reflexarc.training.distributed.processes import DataParallel

    return DataParallel(here)


def threads_of_each(cores: int) -> int:
    """CPU threads for each of the processes on this machine."""
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _asked_of_accelerate() -> str:
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "'reflexarc train' does not run under DeepSpeed, whose moments its checkpoints could "
            "not hold; --engine zero2 divides what DeepSpeed's ZeRO-2 divides, with torch alone",
            field="engine",
        )
    return "fsdp2" if _is_set("ACCELERATE_USE_FSDP") else "ddp"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


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
    state = PartialState(cpu=True, backend=_HOST) if on_cpu else PartialState()
    here: torch.device = state.device
    return here
