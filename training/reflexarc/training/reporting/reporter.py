"""The protocol that the trainer reports through, and several reporters as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Protocol


class RunReporter(Protocol):
    """Told what a run measured. Only the first process of a run has one that writes.

    ``values`` are finite floats by name: losses, ``learning_rate``, ``samples_per_second``,
    ``time/<part>`` in seconds a step, ``gradient_norm/<group>``, ``memory/<what>`` in MB.
    """

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Means of a log interval that ends with optimiser step ``step``, counted from 1."""

    def validation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """What held-out episodes gave after optimiser step ``step``."""

    def message(self, text: str) -> None:
        """A line worth keeping, such as "resuming at step 40"."""

    def close(self) -> None:
        """Write what is held back; further calls do nothing."""


class Reporters:
    """Several reporters as one, told in order; none at all writes nothing."""

    def __init__(self, members: Sequence[RunReporter] = ()) -> None:
        self.members = tuple(members)

    def train(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        for member in self.members:
            member.train(step, epoch, values)

    def validation(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        for member in self.members:
            member.validation(step, epoch, values)

    def message(self, text: str) -> None:
        for member in self.members:
            member.message(text)

    def close(self) -> None:
        for member in self.members:
            member.close()


@contextmanager
def told_in_log(reporter: RunReporter, name: str, step: int, total_steps: int) -> Iterator[None]:
    """Say where a run begins, and by which error the block ends, if by one."""
    begins = f"resuming at step {step}" if step else "starting"
    reporter.message(f"reflexarc {version('reflexarc')}: {name}, {begins} of {total_steps}")
    try:
        yield
    except BaseException as error:
        reporter.message(f"ended by {type(error).__name__}: {error}")
        raise
