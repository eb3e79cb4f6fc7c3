"""What stands between chunks and a robot: limits, a watchdog on old chunks, a safe action."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError, ReflexarcError

logger = logging.getLogger(__name__)

Reaction = Literal["hold", "stop", "raise"]
EventName = Literal[
    "clamped",
    "not_finite",
    "waiting",
    "stale_chunk",
    "late_chunk",
    "missed_answer",
    "disconnected",
    "reconnected",
    "stopped",
]
FloatArray = npt.NDArray[np.float32]
_EVENTS_KEPT = 256
_QUIET: frozenset[EventName] = frozenset(("clamped", "waiting", "late_chunk"))


class RobotStoppedError(ReflexarcError):
    """A guard whose reaction is ``raise`` met a chunk that is too old."""

    code = "robot_stopped"


@dataclass(frozen=True)
class GuardEvent:
    """Something the guard did: its name, the control step where it began, and what was found."""

    name: EventName
    step: int
    detail: str


class RobotGuard:
    """Lets through what is safe, and says what it did.

    The **safe action** is zero in every dimension but the gripper's, which keeps its last
    command; where actions are position targets (``contract.action.kind``) it is the last one
    that was executed. ``hold`` gives the safe action until there is a fresh chunk; ``stop`` gives
    it until :meth:`release`; ``raise`` hands the error to the caller.

    Args:
        contract: of the policy; its limits hold in any case.
        low, high: the robot's own limits ``(D,)`` a step, where they are narrower.
        max_age_steps: control steps after which an observation's chunk is no longer executed;
            None takes twice the horizon, ``math.inf`` sets no limit.
        max_age_ms: the same in milliseconds, for a loop that may be blocked or slow.
        max_wait_ms: how long an executor that waits for its chunk may keep the loop waiting at
            one step; afterwards the safe action goes out. None waits for ever.
        on_stale: reaction to a chunk that is too old.
        on_disconnect: reaction to a server that does not answer.
        gripper_at_start: held before the first action; None opens it.
        hold_at_start: targets ``(D,)`` held before the first action: where the robot is. Position
            targets need it; others stand still at zero.
        on_event: called with every :class:`GuardEvent`; must not raise.

    Attributes:
        counts: how often each event happened, by name; steps for ``clamped``, ``waiting`` and
            ``stopped``, occurrences for the others.
        events: the latest events; one that lasts over several steps stands there once.
        stopped: why the robot stands still until :meth:`release`, or None.
    """

    def __init__(
        self,
        contract: PolicyContract,
        *,
        low: Sequence[float] | npt.NDArray[Any] | None = None,
        high: Sequence[float] | npt.NDArray[Any] | None = None,
        max_age_steps: float | None = None,
        max_age_ms: float | None = None,
        max_wait_ms: float | None = 100.0,
        on_stale: Reaction = "hold",
        on_disconnect: Reaction = "hold",
        gripper_at_start: float | None = None,
        hold_at_start: Sequence[float] | npt.NDArray[Any] | None = None,
        on_event: Callable[[GuardEvent], None] | None = None,
    ) -> None:
        action = contract.action
        self.low, self.high = _limits(contract, low, high)
        self._names, self._gripper = action.names, action.gripper
        self.max_age_steps = 2 * action.horizon if max_age_steps is None else max_age_steps
        self.max_age_ms, self.max_wait_ms = max_age_ms, max_wait_ms
        self.on_stale, self.on_disconnect = on_stale, on_disconnect
        for name, value in (
            ("max_age_steps", self.max_age_steps),
            ("max_age_ms", max_age_ms),
            ("max_wait_ms", max_wait_ms),
        ):
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {value}", field=name)
        self._holds_position = action.kind == "position"
        self._at_start = (
            self._position_at_start(hold_at_start)
            if self._holds_position
            else self._safe_action(gripper_at_start)
        )
        self._on_event = on_event
        self.reset()

    @classmethod
    def limits_only(cls, contract: PolicyContract) -> RobotGuard:
        """Clamps to the contract's limits; waits and raises as if there were no guard."""
        return cls(
            contract,
            max_age_steps=math.inf,
            max_wait_ms=None,
            on_stale="raise",
            on_disconnect="raise",
        )

    def reset(self) -> None:
        """Begin an episode: forget counts and events, and release a stop."""
        self.counts: Counter[EventName] = Counter()
        self.events: deque[GuardEvent] = deque(maxlen=_EVENTS_KEPT)
        self.stopped: str | None = None
        self._safe: FloatArray = self._at_start.copy()
        self._lost = False
        self._last_step: dict[EventName, int] = {}

    def release(self) -> None:
        """Let a stopped robot move again, from a fresh chunk."""
        self.stopped = None

    def clamp(self, actions: npt.NDArray[Any]) -> FloatArray:
        """``(..., D)`` inside the limits; what is not finite stays so, for :meth:`execute`."""
        clamped: FloatArray = np.clip(actions, self.low, self.high).astype(np.float32)
        return clamped

    def execute(self, action: npt.NDArray[Any], step: int) -> FloatArray:
        """The action ``float32 (D,)`` that may be executed in place of ``action``."""
        bad = ~np.isfinite(action)
        if bad.any():
            self.note("not_finite", step, self._listed(bad))
            return self._safe_copy()
        clamped = self.clamp(action)
        outside = clamped != np.asarray(action, np.float32)
        if outside.any():
            self.note("clamped", step, self._listed(outside))
        if self._holds_position:
            self._safe = clamped.copy()
        elif self._gripper is not None:
            self._safe[self._gripper.index] = clamped[self._gripper.index]
        return clamped

    def hold(self, step: int, why: str = "no action is due") -> FloatArray:
        """The safe action, because nothing may or can be executed at this step."""
        if self.stopped is not None:
            self.note("stopped", step, self.stopped)
        else:
            self.note("waiting", step, why)
        return self._safe_copy()

    def is_stale(self, age_steps: int, age_ms: float) -> bool:
        """Whether a chunk of an observation so old must not be executed."""
        return age_steps > self.max_age_steps or (
            self.max_age_ms is not None and age_ms > self.max_age_ms
        )

    def stale(self, step: int, age_steps: int, age_ms: float) -> None:
        """A chunk was too old: react. Raises RobotStoppedError where that is the reaction."""
        detail = f"the chunk's observation is {age_steps} steps, {age_ms:.0f} ms old"
        self.note("stale_chunk", step, detail)
        if self.on_stale == "raise":
            raise RobotStoppedError(f"{detail}; it is not executed")
        if self.on_stale == "stop":
            self.stopped = detail

    def unanswered(self, step: int, error: Exception) -> None:
        """The server did not answer: react. Raises ``error`` where that is the reaction."""
        if self.on_disconnect == "raise":
            raise error
        if not self._lost:
            self._lost = True
            self.note("disconnected", step, str(error))
        if self.on_disconnect == "stop":
            self.stopped = f"the server does not answer: {error}"

    def missed(self, step: int, error: Exception) -> None:
        """The server refused or was too late: the next request follows, what is in hand goes on.

        Raises ``error`` where that is the reaction to a disconnect.
        """
        if self.on_disconnect == "raise":
            raise error
        self.note("missed_answer", step, str(error))

    def answered(self, step: int) -> None:
        """The server answered; ends a disconnect."""
        if self._lost:
            self._lost = False
            self.note("reconnected", step, "the server answers again")

    def note(self, name: EventName, step: int, detail: str) -> None:
        """Count an event, and keep and tell it unless it only goes on from the last step."""
        self.counts[name] += 1
        goes_on = self._last_step.get(name) == step - 1
        self._last_step[name] = step
        if goes_on:
            return
        event = GuardEvent(name, step, detail)
        self.events.append(event)
        level = logging.DEBUG if name in _QUIET else logging.WARNING
        logger.log(level, "step %d: %s: %s", step, name, detail)
        if self._on_event is not None:
            self._on_event(event)

    def _safe_copy(self) -> FloatArray:
        if not np.isfinite(self._safe).all():
            raise RobotStoppedError(
                "nothing was executed yet, so there is no position to hold; give the guard "
                "hold_at_start"
            )
        safe: FloatArray = self._safe.copy()
        return safe

    def _position_at_start(self, targets: Any) -> FloatArray:
        if targets is None:
            if self.on_stale == self.on_disconnect == "raise":
                return np.full(len(self._names), np.nan, np.float32)  # known from the first action
            raise ConfigError(
                "actions are position targets, so the guard must know where the robot is before "
                "the first of them: say hold_at_start",
                field="hold_at_start",
            )
        start = np.asarray(targets, np.float32)
        inside = (
            start.shape == self.low.shape and ((start >= self.low) & (start <= self.high)).all()
        )
        if not inside:
            raise ConfigError(
                f"hold_at_start needs {len(self._names)} targets inside the limits, got "
                f"{start.tolist()}",
                field="hold_at_start",
            )
        return start

    def _safe_action(self, gripper_at_start: float | None) -> FloatArray:
        safe = np.zeros(len(self._names), np.float32)
        if self._gripper is not None:
            start = self._gripper.open if gripper_at_start is None else gripper_at_start
            safe[self._gripper.index] = start
        outside = (safe < self.low) | (safe > self.high)
        if outside.any() and self.on_stale == self.on_disconnect == "raise":
            return np.clip(safe, self.low, self.high)  # nobody relies on standing still
        if outside.any():
            raise ConfigError(
                f"the safe action {safe.tolist()} is outside the limits of "
                f"{self._listed(outside)}; widen them, or say gripper_at_start",
                field="limits",
            )
        return safe

    def _listed(self, mask: npt.NDArray[np.bool_]) -> str:
        return ", ".join(name for name, hit in zip(self._names, mask, strict=True) if hit)


def _limits(contract: PolicyContract, low: Any, high: Any) -> tuple[FloatArray, FloatArray]:
    """The narrower of the contract's limits and the robot's own, each ``float32 (D,)``."""
    own_low = np.asarray(contract.action.low if low is None else low, np.float32)
    own_high = np.asarray(contract.action.high if high is None else high, np.float32)
    shape = (contract.action.dimension,)
    for name, own in (("low", own_low), ("high", own_high)):
        if own.shape != shape or np.isnan(own).any():
            raise ConfigError(f"{name} needs {shape[0]} numbers, got {own.tolist()}", field=name)
    narrow_low = np.maximum(own_low, np.asarray(contract.action.low, np.float32))
    narrow_high = np.minimum(own_high, np.asarray(contract.action.high, np.float32))
    if (narrow_low > narrow_high).any():
        raise ConfigError(
            f"no action lies between low {own_low.tolist()} and high {own_high.tolist()} inside "
            "the contract's limits",
            field="low",
        )
    return narrow_low, narrow_high
