"""Where the time of an optimiser step goes, and how much memory the process holds."""

from __future__ import annotations

import time

import psutil
import torch

PARTS = ("data", "forward", "backward", "optimizer", "other")
_MEBIBYTE = 2**20


class StepClock:
    """Seconds of the parts of a step, without waiting for the device before they are asked for.

    On CUDA the parts are measured by events on the device's stream: ``data`` is then the time in
    which the device had nothing to do because a batch was not there yet. Elsewhere the host's
    clock measures them.

    ``optimizer`` includes clipping and averaged weights. ``other`` is what lies between two
    steps: the trainer's own work and its log lines, but no validation and no checkpoint.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str | None, torch.cuda.Event]] = []
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        """What happened since the last mark belongs to ``part``, one of :data:`PARTS`."""
        if self._on_device:
            self._record(part)
            return
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def skip(self) -> None:
        """What happened since the last mark belongs to no part."""
        if self._on_device:
            self._record(None)
        else:
            self._last = time.perf_counter()

    def close(self, steps: int) -> dict[str, float]:
        """``time/<part>``: seconds a step since the last call, over ``steps`` steps."""
        self.mark("other")
        self._read_events()
        means = {f"time/{part}": value / max(steps, 1) for part, value in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return means

    def _record(self, part: str | None) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((part, event))

    def _read_events(self) -> None:
        if not self._events:
            return
        last = self._events[-1]
        last[1].synchronize()
        for (_, before), (part, after) in zip(self._events, self._events[1:], strict=False):
            if part is not None:
                self._seconds[part] += before.elapsed_time(after) / 1000
        self._events = [last]


def memory_values(device: torch.device) -> dict[str, float]:
    """``memory/rss_mb`` of this process and, on an accelerator, ``memory/device_mb``, in MiB.

    On CUDA the latter is the most that tensors took at once since the process began.
    """
    values = {"memory/rss_mb": psutil.Process().memory_info().rss / _MEBIBYTE}
    if device.type == "cuda":
        values["memory/device_mb"] = torch.cuda.max_memory_allocated(device) / _MEBIBYTE
    elif device.type == "mps":
        values["memory/device_mb"] = torch.mps.current_allocated_memory() / _MEBIBYTE
    return values
