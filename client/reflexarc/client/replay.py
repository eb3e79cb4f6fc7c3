"""Send a recording's observations to a server again, and compare what it answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from reflexarc.client import ChunkPolicy
from reflexarc.contract import ActionChunk, PolicyContract, ReflexarcError
from reflexarc.contract.errors import (
    CodecError,
    ConfigError,
    HistoryMissingError,
    ServerUnavailableError,
)
from reflexarc.contract.recording import RecordedExchange, RecordedSegment, segments

logger = logging.getLogger(__name__)
# What a server refuses because it is busy says nothing about its policy.
_REFUSED_FOR_LOAD = ("not_ready", "deadline_exceeded")


@dataclass
class Difference:
    """Of one action dimension, over all rows of all compared chunks.

    Attributes:
        name: of the dimension.
        max_abs: largest absolute difference, in action units.
        mean_abs: mean absolute difference.
        action_std: of the training data; None where the policy states none.
        worst: which request, session, step and row of the chunk has ``max_abs``.
    """

    name: str
    action_std: float | None
    max_abs: float = 0.0
    mean_abs: float = 0.0
    worst: dict[str, Any] = field(default_factory=dict)

    @property
    def scaled(self) -> float:
        """``max_abs`` in units of ``action_std``, or in action units where that is unknown."""
        return self.max_abs / self.action_std if self.action_std else self.max_abs


@dataclass
class ReplayReport:
    """What a replay found.

    Attributes:
        tolerance: largest ``Difference.scaled`` that counts as the same.
        contract_changes: fields of the contract in which the server differs from the recorded one.
        requests: in the recording.
        compared: answered then and now.
        left_out: why a request was not compared -> how many.
        differences: one an action dimension.
        refusals_changed: requests refused then and answered now, the reverse, or refused for
            another reason.
        timing: name -> what the server stated then and now, and the round trip now, as
            ``{"recorded" | "replayed": {"median", "p95"}}`` in milliseconds.
    """

    tolerance: float
    contract_changes: list[str]
    differences: list[Difference]
    requests: int = 0
    compared: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    refusals_changed: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def differs(self) -> bool:
        """Whether the server answered otherwise than the recorded one."""
        return bool(self.refusals_changed) or any(
            difference.scaled > self.tolerance for difference in self.differences
        )

    def to_json(self) -> dict[str, Any]:
        report = asdict(self)
        for shown, difference in zip(report["differences"], self.differences, strict=True):
            shown["scaled"] = difference.scaled
        return {**report, "differs": self.differs}


def open_recording(directory: Path) -> list[RecordedSegment]:
    """The readable segments of a recording, oldest first. Raises ConfigError: there are none."""
    found = segments(directory)
    if not found:  # also where there is no such directory
        raise ConfigError(
            f"{directory} holds no recording; make one with: serve-policy --record DIR",
            field="replay",
        )
    readable = []
    for path in found:
        try:
            readable.append(RecordedSegment(path))
        except CodecError as error:  # its writer was killed before the header was on disk
            logger.warning("left out: %s", error.message)
    return readable


def replay(
    recording: Sequence[RecordedSegment],
    client: ChunkPolicy,
    *,
    action_std: Sequence[float] | None = None,
    tolerance: float = 1e-3,
    notify: Callable[[], None] = lambda: None,
) -> tuple[ReplayReport, list[str]]:
    """Send every recorded observation in its order: same seed, options and sessions.

    Sessions get names of their own, so that a server that robots use at the same time keeps
    theirs. Deadlines are not sent: they would compare the load.

    Args:
        recording: of :func:`open_recording`.
        client: the server's.
        action_std: of the server; the recorded one goes before.
        tolerance: see :class:`ReplayReport`.
        notify: called after each recorded request.

    Returns the report and the names of the sessions that were opened.

    Raises:
        ConfigError: the server's actions are of other dimensions than the recorded.
        ServerUnavailableError: the server went away.
    """
    recorded_std = recording[-1].header.get("action_std")
    std = recorded_std if recorded_std is not None else action_std
    names = client.contract.action.names
    differences = [
        Difference(name, None if std is None else float(std[i])) for i, name in enumerate(names)
    ]
    changes = sorted({change for part in recording for change in _changes(part, client.contract)})
    player = _Player(client, ReplayReport(tolerance, changes, differences))
    for index, (run, exchange) in enumerate(_exchanges(recording)):
        player.play(index, run, exchange)
        notify()
    return player.finish(), player.sessions


def _exchanges(recording: Sequence[RecordedSegment]) -> Iterator[tuple[str, RecordedExchange]]:
    for segment in recording:
        run = str(segment.header.get("run", segment.path.stem))
        for exchange in segment:
            yield run, exchange


def _changes(segment: RecordedSegment, now: PolicyContract) -> list[str]:
    """Fields of the contract that differ. Raises ConfigError where chunks cannot be compared."""
    try:
        then = PolicyContract.model_validate(segment.header["contract"])
    except ValueError as error:
        raise CodecError(f"{segment.path}: its contract cannot be read: {error}") from error
    if (then.action.names, then.action.horizon) != (now.action.names, now.action.horizon):
        raise ConfigError(
            f"{segment.path} holds chunks of {then.action.horizon} x {list(then.action.names)}, "
            f"the server gives {now.action.horizon} x {list(now.action.names)}: nothing can be "
            "compared; replay against a server of the same kind of policy",
            field="replay",
        )
    return [name for name in type(now).model_fields if getattr(then, name) != getattr(now, name)]


class _Player:
    """Sends one request after the other and fills the report."""

    def __init__(self, client: ChunkPolicy, report: ReplayReport) -> None:
        self._client, self._report = client, report
        self._token = uuid4().hex[:12]
        self._names: dict[tuple[str, str], str] = {}
        self._whole: set[str] = set()  # sessions that the recording has from their first step
        self._sum = np.zeros(len(report.differences))
        self._rows = 0
        self._recorded: dict[str, list[float]] = {}
        self._replayed: dict[str, list[float]] = {}

    @property
    def sessions(self) -> list[str]:
        return list(self._names.values())

    def play(self, index: int, run: str, recorded: RecordedExchange) -> None:
        report, then = self._report, _code(recorded.error)
        report.requests += 1
        if recorded.dropped_before:
            self._whole.clear()
        if recorded.observation is None:
            self._leave_out("could not be read when it was recorded")
            return
        if then in _REFUSED_FOR_LOAD:
            self._leave_out(f"refused then with {then}")
            return
        session = self._session(run, recorded)
        now, chunk = self._ask(recorded, session)
        if now == HistoryMissingError.code and then is None and session not in self._whole:
            self._leave_out("the recording lacks earlier requests of its session")
        elif now != then:
            report.refusals_changed.append(
                {
                    **_where(index, recorded),
                    "recorded": then or "answered",
                    "now": now or "answered",
                }
            )
        elif chunk is not None and recorded.actions is not None:
            self._compare(index, recorded, chunk)

    def _leave_out(self, reason: str) -> None:
        self._report.left_out[reason] = self._report.left_out.get(reason, 0) + 1

    def _session(self, run: str, recorded: RecordedExchange) -> str | None:
        assert recorded.observation is not None
        if recorded.session is None:
            return None
        key = (run, recorded.session)
        name = self._names.setdefault(key, f"replay-{self._token}-{len(self._names)}")
        if recorded.observation.step_index == 0:
            self._whole.add(name)
        return name

    def _ask(
        self, recorded: RecordedExchange, session: str | None
    ) -> tuple[str | None, ActionChunk | None]:
        """The error code, if it is refused, or the chunk."""
        assert recorded.observation is not None
        observation = replace(
            recorded.observation, session_id=session, request_id=None, deadline_ms=None
        )
        started = time.perf_counter()
        try:
            chunk = self._client.infer(observation)
        except ServerUnavailableError:
            raise
        except ReflexarcError as error:
            return error.code, None
        round_trip = (time.perf_counter() - started) * 1000
        for times, timing in (
            (self._recorded, recorded.timing),
            (self._replayed, {**chunk.timing, "round_trip_ms": round_trip}),
        ):
            for name, value in timing.items():
                times.setdefault(name, []).append(float(value))
        return None, chunk

    def _compare(self, index: int, recorded: RecordedExchange, chunk: ActionChunk) -> None:
        assert recorded.actions is not None
        gap = np.abs(chunk.actions.astype(np.float64) - recorded.actions)  # (horizon, D)
        self._report.compared += 1
        self._sum += gap.sum(axis=0)
        self._rows += len(gap)
        for column, difference in enumerate(self._report.differences):
            row = int(gap[:, column].argmax())
            if gap[row, column] > difference.max_abs:
                difference.max_abs = float(gap[row, column])
                difference.worst = {**_where(index, recorded), "row": row}

    def finish(self) -> ReplayReport:
        for difference, total in zip(self._report.differences, self._sum, strict=True):
            difference.mean_abs = float(total) / max(1, self._rows)
        for name in sorted({*self._recorded, *self._replayed}):
            self._report.timing[name] = {
                when: _quantiles(times[name])
                for when, times in (("recorded", self._recorded), ("replayed", self._replayed))
                if name in times
            }
        return self._report


def _where(index: int, recorded: RecordedExchange) -> dict[str, Any]:
    seen = recorded.observation
    return {
        "request": index,
        "session": recorded.session,
        "step_index": None if seen is None else seen.step_index,
    }


def _code(error: Mapping[str, Any] | None) -> str | None:
    return None if error is None else str(error.get("code"))


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    median, p95 = np.quantile(values, [0.5, 0.95])
    return {"median": round(float(median), 3), "p95": round(float(p95), 3)}
