"""Pieces of a scan on as many threads as torch computes on.

Torch divides each operation among its threads, which a scan, a long chain of small operations,
gains nothing from. Here every thread walks its own part of the channels from the first step to the
last. Torch's operations release the interpreter's lock while they compute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch

# Torch divides an operation on more values than these among threads of its own, so that a task
# whose operations are no larger stays on its thread (at::internal::GRAIN_SIZE).
VALUES_ON_ONE_THREAD = 1 << 15

Task = Callable[[], None]


def run(tasks: Sequence[Task]) -> None:
    """Run all tasks, on threads of a shared pool and on the caller's; none may want gradients.

    What no thread has begun when the caller has time, the caller does: callers that come together
    do not wait for each other's tasks, and a pool that cannot start threads costs only time.
    """
    inference = torch.is_inference_mode_enabled()
    waiting = [(task, _submit(task, inference)) for task in tasks[1:]]
    try:
        _without_gradients(tasks[0], inference)
        for task, future in waiting:
            if future is None or future.cancel():
                _without_gradients(task, inference)
    finally:
        # Also after an error: the others write into the caller's tensors.
        failures = [future.exception() for _, future in waiting if future and not future.cancel()]
    for failure in failures:
        if failure is not None:
            raise failure


def _submit(task: Task, inference: bool) -> Future[None] | None:
    try:
        return _shared_pool().submit(_without_gradients, task, inference)
    except RuntimeError:  # the interpreter is shutting down, or may start no thread
        return None


def _without_gradients(task: Task, inference: bool) -> None:
    """Modes belong to a thread: in a new one gradients would be recorded."""
    with torch.inference_mode(inference), torch.no_grad():
        task()


@cache
def _shared_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scan")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool, but none of its threads.
    os.register_at_fork(after_in_child=_shared_pool.cache_clear)
