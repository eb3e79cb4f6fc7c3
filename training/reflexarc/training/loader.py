"""The batches of a step, read when they are asked for or ahead of time by threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from reflexarc.training.objective import Batch
from reflexarc.training.samples import BatchSource

_AHEAD_OF_EACH = 2


class BatchLoader:
    """Reads the batches of optimiser steps; a context manager, which ends its threads.

    Which samples a batch holds is a function of the step alone, so neither the number of threads
    nor the moment at which a run was resumed changes what is trained on.

    Args:
        source: of the samples.
        wanted: a step's passes, each as indices of samples ``int64 (B,)``; called in the thread
            that calls ``batches``, in the order of the steps.
        workers: threads that read ahead; 0 reads when asked.
        total_steps: nothing is read beyond.
    """

    def __init__(
        self,
        source: BatchSource,
        wanted: Callable[[int], Sequence[Tensor]],
        *,
        workers: int = 0,
        total_steps: int = 0,
    ) -> None:
        self._source, self._wanted = source, wanted
        self._total_steps = total_steps
        self._ahead = workers * _AHEAD_OF_EACH
        self._threads = ThreadPoolExecutor(workers, "batches") if workers else None
        self._reading: dict[int, list[Future[Batch]]] = {}

    def batches(self, step: int) -> list[Batch]:
        """The batches of ``step``, one a pass."""
        if self._threads is None:
            return [self._source.batch(indices) for indices in self._wanted(step)]
        for other in range(step, min(step + self._ahead + 1, self._total_steps)):
            if other not in self._reading:
                self._reading[other] = [
                    self._threads.submit(self._source.batch, indices)
                    for indices in self._wanted(other)
                ]
        return [future.result() for future in self._reading.pop(step)]

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()
