"""SIGINT, SIGTERM and SIGUSR1 as a request to stop after the current step.

SIGTERM is what a scheduler sends before it takes a machine away; SIGUSR1 what Slurm sends a
while before that when it is asked to (``--signal=USR1@120``).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from reflexarc.training.distributed.engine import Engine

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest:
    """Which signal asked for a stop, if one did."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    def agreed(self, engine: Engine) -> bool:
        """Whether any process of the engine was asked to stop; all of them have to call this."""
        number = engine.highest(0 if self.by is None else self.by.value)
        if number and self.by is None:
            self.by = signal.Signals(number)
        return number > 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block these signals ask for a stop; only in the process's main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.by = signal.Signals(number)

        before: list[tuple[signal.Signals, Callable[..., Any] | int | None]] = [
            (number, signal.signal(number, ask)) for number in STOP_SIGNALS
        ]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)
