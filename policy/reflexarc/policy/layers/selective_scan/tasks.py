"""Pieces of a scan on as many threads as torch computes on.

Torch divides each operation among its threads, which a scan, a long chain of small operations,
gains nothing from. Here every thread walks its own part of the channels from the first step to the
last, and torch is kept from dividing what that thread computes. Torch's operations release the
interpreter's lock while they compute: the larger they are, the less the threads wait for it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from threadpoolctl import LibController

# Torch divides an operation on more values than these among threads of its own
# (at::internal::GRAIN_SIZE).
GRAIN_VALUES = 1 << 15
# Of one name: 8 MiB of fp32, twice that of double. A thread keeps them until it ends.
MOST_KEPT_VALUES = 1 << 21

Task = Callable[[], object]


def values_on_one_thread(wanted: int) -> int:
    """How large an operation of a task may be without torch dividing it, up to ``wanted``."""
    return wanted if _openmp() else min(wanted, GRAIN_VALUES)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def workspace(name: str, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Memory of any content, ``like.shape`` unless told; valid until its thread asks for the name.

    A CPU's is kept: the pages of new memory cost more than what is computed in it.
    """
    shape = like.shape if shape is None else shape
    values = math.prod(shape)
    plain = type(like) is Tensor and like.device.type == "cpu"  # no tensor that only pretends
    if not plain or values > MOST_KEPT_VALUES:
        return like.new_empty(shape)
    key = (name, like.dtype)
    buffer = _kept.buffers.get(key)
    if buffer is None or buffer.numel() < values:
        with torch.inference_mode(False):  # what is made in it may not be written to outside
            buffer = torch.zeros(values, dtype=like.dtype, device="cpu")
        if type(buffer) is Tensor:
            _kept.buffers[key] = buffer
    return buffer[:values].view(shape)


def run(tasks: Sequence[Task]) -> None:
    """Run all tasks, on threads of a shared pool and on the caller's; none may want gradients.

    What no thread has begun when the caller has time, the caller does: callers that come together
    do not wait for each other's tasks, and a pool that cannot start threads costs only time.
    """
    inference = torch.is_inference_mode_enabled()
    waiting = [(task, _submit(task, inference)) for task in tasks[1:]]
    try:
        _alone(tasks[0], inference)
        for task, future in waiting:
            if future is None or future.cancel():
                _alone(task, inference)
    finally:
        # Also after an error: the others write into the caller's tensors.
        failures = [future.exception() for _, future in waiting if future and not future.cancel()]
    for failure in failures:
        if failure is not None:
            raise failure


def _submit(task: Task, inference: bool) -> Future[None] | None:
    try:
        return _shared_pool().submit(_alone, task, inference)
    except RuntimeError:  # the interpreter is shutting down, or may start no thread
        return None


def _alone(task: Task, inference: bool) -> None:
    """Modes and OpenMP's number of threads belong to a thread: a new one has neither."""
    torch.get_num_threads()  # in a new thread torch first sets OpenMP's number to its own
    before = [library.get_num_threads() for library in _openmp()]
    try:
        for library in _openmp():
            library.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():
            task()
    finally:
        for library, threads in zip(_openmp(), before, strict=True):
            library.set_num_threads(threads)


@cache
def _openmp() -> tuple[LibController, ...]:
    """The loaded OpenMP libraries, torch's among them.

    None where torch has other threads, or where threadpoolctl is missing: tasks are then small.
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return ()
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return ()
    return tuple(ThreadpoolController().select(user_api="openmp").lib_controllers)


@cache
def _shared_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scan")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool, but none of its threads.
    os.register_at_fork(after_in_child=_shared_pool.cache_clear)
