"""``train.log``: the run in plain text, one line an event, for people and for ``tail -f``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path


class TextLog:
    """Appends lines with their time in UTC; each is in the file as soon as it is written.

    A run that is resumed goes on in the same file: steps that a killed run had done beyond its
    last checkpoint stand there twice, since a log tells what happened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self.message(f"step {step} epoch {epoch:.3f} {_listed(values)}")

    def validation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        self.message(f"validation after step {step} epoch {epoch:.3f} {_listed(values)}")

    def message(self, text: str) -> None:
        if self._file.closed:
            return
        time = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._file.write("".join(f"{time} {line}\n" for line in text.splitlines()))

    def close(self) -> None:
        self._file.close()


def _listed(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.6g}" for name, value in values.items())
