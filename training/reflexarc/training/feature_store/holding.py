"""Where frame features are read from while training: the device, memory, or the disk."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reflexarc.training.feature_store.dtypes import FeatureArray, as_rows
from reflexarc.training.feature_store.row_cache import RowCache

_COMFORTABLE = 0.25
_READ_BYTES = 1 << 26
_POPULATE_READ = 22  # MADV_POPULATE_READ, which Python does not name
_MEMORY_INFO = Path("/proc/meminfo")
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_USED = Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class HeldFeatures:
    """Features by name, rows first.

    Attributes:
        rows: tensors in memory, or over the memory-mapped files, or what keeps some of them.
        place: where that is, in words.
    """

    rows: Mapping[str, Tensor | RowCache]
    place: str

    def statistics(self) -> list[str]:
        """A line for each array that is kept in part."""
        kept = {n: rows for n, rows in self.rows.items() if isinstance(rows, RowCache)}
        return [f"feature cache of {name}: {rows.statistics()}" for name, rows in kept.items()]


def hold_features(
    arrays: Mapping[str, FeatureArray],
    device: torch.device,
    *,
    processes: int = 1,
    limit: int | None = None,
) -> HeldFeatures:
    """Load features that take less than a quarter of what is free; the device's memory first.

    A page fault a row costs more than a small policy's whole step, and so does a copy to a device.

    Args:
        arrays: over memory-mapped files.
        device: that trains.
        processes: of this machine that call this. Several share what the system has read of the
            files, so that the memory holds it once, and each maps it at once, without faults.
        limit: bytes; then rows are read from the disk, and those read last are kept up to it.
    """
    size = sum(array.nbytes for array in arrays.values())
    if limit is not None:
        caches = {n: RowCache(as_rows(a), limit * a.nbytes // size) for n, a in arrays.items()}
        return HeldFeatures(caches, f"on disk, {limit / 2**20:,.0f} MiB of it in memory")
    place = place_of(size, device)
    if place == "cuda":
        # From the map: a copy in the host's memory would be one for every process.
        return HeldFeatures({n: as_rows(a).to(device) for n, a in arrays.items()}, f"on {device}")
    if place == "cpu" and processes > 1 and all(_map_at_once(array) for array in arrays.values()):
        shared = f"in memory, shared by {processes} processes"
        return HeldFeatures({n: as_rows(a) for n, a in arrays.items()}, shared)
    if size * processes < _COMFORTABLE * free_memory():
        return HeldFeatures({n: _load(a) for n, a in arrays.items()}, "in memory")
    return HeldFeatures({n: as_rows(a) for n, a in arrays.items()}, "on disk, memory-mapped")


def place_of(size: int, device: torch.device) -> Literal["cuda", "cpu", "disk"]:
    """Where features of ``size`` bytes are held by a process that trains on ``device``."""
    if device.type == "cuda" and size < _COMFORTABLE * torch.cuda.mem_get_info(device)[0]:
        return "cuda"
    return "cpu" if size < _COMFORTABLE * free_memory() else "disk"


def free_memory() -> int:
    """Bytes that this process may still take: the system's and its control group's; 0 unknown."""
    try:
        lines = _MEMORY_INFO.read_text().splitlines()
        free = 1024 * next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable:"))
        limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
        return free if limit == "max" else min(free, int(limit) - int(_USED.read_text()))
    except (OSError, StopIteration, ValueError):  # no Linux: leave it to the page cache
        return 0


def _map_at_once(array: FeatureArray) -> bool:
    """Read a mapped file and enter all its pages into this process's map; False if it cannot."""
    mapped = getattr(array, "_mmap", None)
    if mapped is None:
        return False
    try:
        mapped.madvise(_POPULATE_READ)
    except (AttributeError, OSError, ValueError):  # no Linux, or one before 5.14
        return False
    return True


def _load(array: FeatureArray) -> Tensor:
    """A copy, made in pieces: beside it at most ``_READ_BYTES`` of the file stay in the map."""
    loaded = np.empty(array.shape, array.dtype)
    mapped = getattr(array, "_mmap", None)
    rows = max(1, _READ_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        loaded[start : start + rows] = array[start : start + rows]
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # the system keeps the file's pages, if it can
    return as_rows(loaded)
