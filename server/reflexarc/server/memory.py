"""Whether a checkpoint fits into memory, from file sizes alone, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from reflexarc.contract.errors import DoesNotFitError

WEIGHTS = ".safetensors"
# What loading needs beside the weights: torch itself, the activations of a small batch.
_BASE_BYTES_CPU, _BASE_BYTES_GPU = 300 * 2**20, 600 * 2**20
_GIB = 2**30


def check_fits(folder: Path, device: str) -> None:
    """Raise DoesNotFitError where a checkpoint needs more than a device has left.

    Counted are the checkpoint's own weights. A frozen backbone that stands elsewhere is not: it
    is loaded by its family, and comes on top. While it is loaded, the file is in memory beside
    the tensors that are made of it.

    Args:
        folder: resolved; its files are not read.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
    """
    weights = [path.stat().st_size for path in folder.glob(f"*{WEIGHTS}")]
    if not weights:
        return
    host = sum(weights) + max(weights)
    if device.startswith("cuda"):
        _check(folder, sum(weights) + _BASE_BYTES_GPU, _free_on_gpu(device), f"the GPU {device}")
    _check(folder, host + _BASE_BYTES_CPU, available_memory(), "this machine")


def _check(folder: Path, needed: int, free: int | None, where: str) -> None:
    if free is not None and needed > free:
        raise DoesNotFitError(
            f"{folder} needs {needed / _GIB:.1f} GiB to be loaded and {where} has "
            f"{free / _GIB:.1f} GiB left; end other programs, raise the container's limit, or "
            "serve it on a larger machine. Nothing was loaded",
            field="ckpt",
        )


def _free_on_gpu(device: str) -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None  # refused elsewhere, by name
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(free)


def available_memory() -> int | None:
    """Bytes, the least of what the system and the control group leave; None where unknown."""
    free: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        free += _left_in_group(Path("/sys/fs/cgroup"))
    except (OSError, ValueError):
        pass
    if not free and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free)) if free else None


def _left_in_group(group: Path) -> list[int]:
    """What a container's own limit leaves. Its file cache is given back when it is needed."""
    limit = (group / "memory.max").read_text().strip()
    if limit == "max":
        return []
    statistics = dict(
        line.split() for line in (group / "memory.stat").read_text().splitlines() if line
    )
    used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
    return [int(limit) - used]
