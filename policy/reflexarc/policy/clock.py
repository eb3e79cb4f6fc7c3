"""How long the stages of an inference take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Milliseconds by name; waits for the accelerator, which computes asynchronously."""

    def __init__(self, device: torch.device):
        self._device = device
        self.milliseconds: dict[str, float] = {}
        self._synchronize: Callable[[], None] = {
            "cuda": torch.cuda.synchronize,
            "mps": torch.mps.synchronize,
        }.get(device.type, lambda: None)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._synchronize()
        spent = (time.perf_counter() - start) * 1e3
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent

    def copy(self) -> Clock:
        """A clock that goes on from here, for one of several groups."""
        copied = Clock(self._device)
        copied.milliseconds.update(self.milliseconds)
        return copied
