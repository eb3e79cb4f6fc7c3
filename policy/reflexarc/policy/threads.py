"""How a policy computes on a CPU: how many threads, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from pathlib import Path

import torch

# Where a container's share of the processor stands, by version of cgroups.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_OLD_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_OLD_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h; 32 MiB is where glibc's own adapting ends.
_MALLOC_OPTIONS = {-3: 32 << 20, -1: 256 << 20}


def use_threads(count: int | None = None) -> int:
    """Let torch compute on ``count`` threads, in all of this process; returns how many.

    None takes ``OMP_NUM_THREADS`` where that is set, else every core this process may use.
    Freed memory is kept from then on, see :func:`keep_freed_memory`.
    """
    keep_freed_memory()
    if count is None:
        stated = os.environ.get("OMP_NUM_THREADS", "")
        count = int(stated) if stated.isdecimal() and int(stated) else usable_cores()
    torch.set_num_threads(count)
    return count


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep what tensors free, up to 256 MiB; whether it does now.

    By the luck of a process' heap it otherwise returns large tensors to the system each time, and
    each page that comes anew costs microseconds: one of six processes that served the demo
    checkpoint took 59 ms a decision (9,400 page faults), the others 32 to 42.

    What ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES`` ask for is
    left alone, and so is any other C library.
    """
    if any(name in os.environ for name in _MALLOC_VARIABLES):
        return False
    try:
        change = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    changed = [change(option, value) for option, value in _MALLOC_OPTIONS.items()]
    return all(result == 1 for result in changed)


def usable_cores() -> int:
    """Cores that this process may run on and has the time of, at least 1.

    A container may see all cores of its machine and be given the time of two: threads for all of
    them would wait for each other most of the time.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _quota()
    return cores if quota >= cores else max(1, math.ceil(quota))


def _quota() -> float:
    """Cores' worth of time that the container is given; infinite without a limit."""
    try:
        if _QUOTA.is_file():
            most, period = _QUOTA.read_text().split()[:2]
        else:
            most, period = _OLD_QUOTA.read_text(), _OLD_PERIOD.read_text()
        quota = float(most) / float(period)  # "max" is no number
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return quota if quota > 0 else math.inf
