"""SIGINT and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Which signal asked for a stop, if one did."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the two signals ask for a stop; only in the process's main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.by = signal.Signals(number)

        before: list[tuple[signal.Signals, Callable[..., Any] | int | None]] = [
            (number, signal.signal(number, ask)) for number in (signal.SIGINT, signal.SIGTERM)
        ]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)
