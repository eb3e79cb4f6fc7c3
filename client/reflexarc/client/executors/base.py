"""What all executors share: when they look, ask and hold, and how chunks and steps are aligned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from reflexarc.client.executors.asking import (
    Answer,
    Asker,
    BackgroundAsker,
    ChunkPolicy,
    DirectAsker,
    Question,
)
from reflexarc.client.executors.chunks import HeldChunk
from reflexarc.client.executors.guard import RobotGuard
from reflexarc.client.executors.latency import LatencyInjected
from reflexarc.client.history import HistoryRecorder
from reflexarc.contract import ActionChunk, Observation
from reflexarc.contract.errors import (
    ConfigError,
    DeadlineExceededError,
    HistoryMissingError,
    NotReadyError,
    ServerUnavailableError,
    StaleReplyError,
    TooManyRequestsError,
)

FloatArray = npt.NDArray[np.float32]
Observe = Callable[[], Observation]
ObserveState = Callable[[], npt.NDArray[Any]]
# The server lives, and a later request may fare better.
_MISSED = (DeadlineExceededError, TooManyRequestsError, StaleReplyError)
_Executor = TypeVar("_Executor", bound="ChunkExecutor")


@dataclass(frozen=True)
class _UnderWay:
    """A request whose answer has not been seen yet."""

    answer: Answer
    observation: Observation
    step: int
    executed: int
    seen_ms: float


class ChunkExecutor(ABC):
    """One action a control step, from chunks that a policy is asked for.

    A context manager; ``close`` ends the thread of an executor that has one. A policy that sees
    past frames or states gets them with the next request: this looks at exactly the steps that
    later requests may need, sends what was seen since the last one, and the whole window again
    where the server has lost it (it restarted, or another replica answers).

    At most one request is under way, and an answer belongs to its request alone: one that comes
    after ``reset`` is never looked at.

    Args:
        policy: who is asked. With :class:`LatencyInjected` ``in_steps`` answers come as many
            control steps later as it says, in the calling thread.
        guard: None clamps to the contract's limits, waits for answers and raises every error.

    Attributes:
        guard: counts and names what it did.
        latencies_ms: milliseconds that each chunk took since the last reset, rendering and
            injected steps not included.
        delays: control steps that each chunk took.
        held: steps at which the safe action was given.
    """

    def __init__(
        self, policy: ChunkPolicy, guard: RobotGuard | None = None, *, in_background: bool = True
    ) -> None:
        """``in_background``: ask from a thread, unless the policy's latency counts in steps."""
        self._policy = policy
        self.guard = guard if guard is not None else RobotGuard.limits_only(policy.contract)
        self._asker = _asker(policy, in_background)
        self.reset()

    def __enter__(self: _Executor) -> _Executor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask no more. May be called twice."""
        self._asker.close()

    def reset(self) -> None:
        """Begin an episode: forget the chunks in hand, what was seen, and the counts."""
        self.guard.reset()
        self._chunks: list[HeldChunk] = []
        self._under_way: _UnderWay | None = None
        self._step = 0  # control steps, those of holding too
        self._executed = 0  # actions of chunks
        self._since_ask = 0
        self._recorder = HistoryRecorder(self._policy.contract, self._request_period())
        self.latencies_ms: list[float] = []
        self.delays: list[int] = []
        self.held = 0

    @property
    def chunks(self) -> int:
        """Chunks that came since the last reset."""
        return len(self.latencies_ms)

    def next_action(
        self, observe: Observe, observe_state: ObserveState | None = None
    ) -> FloatArray:
        """The action ``float32 (D,)`` to execute now.

        Args:
            observe: called only when a chunk is asked for, or when a later request sees this
                step's frame, so that a simulator renders on demand. An observation without
                ``step_index`` gets the number of control steps so far.
            observe_state: called in place of ``observe`` where a later request sees this step's
                state ``(S,)`` but not its frame. Without it ``observe`` is called there too.

        Raises what the policy raises: at once for a wrong request or a failing policy, by the
        guard's choice for a server that does not answer.
        """
        action = self._act(observe, observe_state)
        self._step += 1
        self._since_ask += 1
        return action

    @abstractmethod
    def _is_due(self) -> bool:
        """Whether a chunk should be asked for now. Nothing is under way."""

    @abstractmethod
    def _take(self, chunk: HeldChunk) -> None:
        """Put a chunk that came into ``_chunks``."""

    def _planned(self) -> FloatArray | None:
        """The action ``(D,)`` to execute now, or None where there is none."""
        return self._chunks[-1].rest(self._executed)[0].copy() if self._chunks else None

    def _request(self, observation: Observation) -> Observation:
        """The observation with what else the request carries."""
        return observation

    def _request_period(self) -> int:
        """Every so many steps may be a request's: 1 where it can be any of them."""
        return 1

    def _patience_ms(self) -> float | None:
        """How long the loop waits for an answer at the step of its request; None is for ever."""
        return 0.0

    def _act(self, observe: Observe, observe_state: ObserveState | None) -> FloatArray:
        if self.guard.stopped is None:
            self._collect()
        may_ask = self.guard.stopped is None and self._under_way is None
        if may_ask and self._is_due():
            seen_ms = self._asker.now_ms(self._step)  # cameras may be slow
            self._ask(observe(), seen_ms)
            self._collect()
        else:
            self._look(observe, observe_state)
        if self.guard.stopped is not None:
            self._drop_all()
        planned = self._planned()
        if planned is None:
            self.held += 1
            return self.guard.hold(self._step, "no chunk covers this step")
        self._executed += 1
        return self.guard.execute(planned, self._step)

    def _ask(self, observation: Observation, seen_ms: float) -> None:
        if observation.step_index is None:
            observation = replace(observation, step_index=self._step)
        self._step, self._since_ask = observation.step_index or 0, 0
        answer = self._asker.ask(self._question(self._request(observation)), self._step)
        self._under_way = _UnderWay(answer, observation, self._step, self._executed, seen_ms)
        patience = self._patience_ms()
        if patience is not None:
            answer.wait(patience / 1000)

    def _question(self, observation: Observation) -> Question:
        policy = self._policy
        if not policy.contract.needs_session or observation.history:
            return lambda: policy.infer(observation)
        with_new, with_all = self._recorder.request(observation), self._recorder.whole(observation)

        def ask() -> ActionChunk:
            try:
                return policy.infer(with_new)
            except HistoryMissingError:
                # A chunk depends on its window alone: nothing of the request was executed.
                return policy.infer(with_all)

        return ask

    def _collect(self) -> None:
        """Take the answer, if it is there; drop what is finished or too old."""
        request = self._under_way
        if request is not None and request.answer.is_there(self._step):
            self._under_way = None
            chunk = self._chunk_of(request)
            if chunk is not None:
                self._receive(request, chunk)
        self._chunks = [chunk for chunk in self._chunks if chunk.left(self._executed)]
        self._drop_stale()

    def _chunk_of(self, request: _UnderWay) -> ActionChunk | None:
        try:
            chunk = request.answer.chunk()
        except _MISSED as error:
            self._recorder.unanswered(request.observation)
            self.guard.missed(self._step, error)
            return None
        except (ServerUnavailableError, NotReadyError, OSError) as error:
            self._recorder.unanswered(request.observation)
            self._chunks.clear()  # nobody corrects what they would do
            self.guard.unanswered(self._step, error)
            return None
        self.guard.answered(self._step)
        self._recorder.answered(request.observation)
        return chunk

    def _receive(self, request: _UnderWay, chunk: ActionChunk) -> None:
        self.latencies_ms.append(request.answer.milliseconds)
        self.delays.append(self._step - request.step)
        held = HeldChunk(chunk.actions, request.step, request.executed, request.seen_ms)
        self._take(held)

    def _drop_all(self) -> None:
        """After a stop only a fresh chunk may move the robot."""
        self._chunks.clear()
        if self._under_way is not None:
            self._recorder.unanswered(self._under_way.observation)
            self._under_way = None

    def _drop_stale(self) -> None:
        now = self._asker.now_ms(self._step)
        for chunk in list(self._chunks):
            age_steps, age_ms = self._step - chunk.step, now - chunk.seen_ms
            if self.guard.is_stale(age_steps, age_ms):
                self._chunks.remove(chunk)
                self.guard.stale(self._step, age_steps, age_ms)

    def _look(self, observe: Observe, observe_state: ObserveState | None) -> None:
        """See this step for later requests, as little of it as they need."""
        if self._recorder.needs_images(self._since_ask):
            seen = observe()
            self._recorder.record(self._step, seen.state, seen.images)
        elif self._recorder.needs_state(self._since_ask):
            state = observe().state if observe_state is None else observe_state()
            self._recorder.record(self._step, state, None)


def check_replan_steps(replan_steps: int, horizon: int) -> None:
    """Raise ConfigError unless so many actions can be executed of a chunk."""
    if not 1 <= replan_steps <= horizon:
        raise ConfigError(
            f"replan_steps must be from 1 to the horizon {horizon}, got {replan_steps}",
            field="replan_steps",
        )


def _asker(policy: ChunkPolicy, in_background: bool) -> Asker:
    if isinstance(policy, LatencyInjected) and policy.in_steps:
        return DirectAsker(policy.delay_steps, policy.period_ms)
    return BackgroundAsker() if in_background else DirectAsker()
