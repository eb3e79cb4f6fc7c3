"""How an executor asks: at once, from a thread while the robot moves, or with a delay in steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from typing import Protocol, TypeAlias

from reflexarc.contract import ActionChunk, Observation, PolicyContract

Question = Callable[[], ActionChunk]
_JOIN_SECONDS = 1.0


class ChunkPolicy(Protocol):
    """Anything that answers an observation with a chunk: a client, or a policy in process."""

    contract: PolicyContract

    def infer(self, observation: Observation) -> ActionChunk: ...


class Answer:
    """The answer to one question, which may still be under way.

    Attributes:
        milliseconds: that the question took, once it is answered.
    """

    def __init__(self, ready_at: int = 0) -> None:
        """``ready_at`` is the control step before which the answer is not looked at."""
        self._future: Future[ActionChunk] = Future()
        self._ready_at = ready_at
        self.milliseconds = 0.0

    def run(self, question: Question) -> None:
        """Ask, and keep the chunk or the error. Ctrl-C is not kept but raised."""
        started = time.perf_counter()
        try:
            chunk = question()
        except Exception as error:
            self._finish(started)
            self._future.set_exception(error)
        else:
            self._finish(started)
            self._future.set_result(chunk)

    def _finish(self, started: float) -> None:
        self.milliseconds = (time.perf_counter() - started) * 1000

    def is_there(self, step: int) -> bool:
        """Whether the answer can be had at a control step without waiting."""
        return self._future.done() and step >= self._ready_at

    def wait(self, seconds: float) -> None:
        """Wait for an answer at most so long."""
        with suppress(TimeoutError):
            self._future.exception(timeout=seconds)

    def chunk(self) -> ActionChunk:
        """The chunk; raises what the question raised."""
        return self._future.result()


class Asker(Protocol):
    """Puts questions, one after the other."""

    def ask(self, question: Question, step: int) -> Answer:
        """Put a question at a control step."""

    def now_ms(self, step: int) -> float:
        """Milliseconds on the clock by which chunks grow old."""

    def close(self) -> None:
        """Put no more questions."""


class DirectAsker:
    """Asks in the calling thread: the answer is there when ``ask`` returns.

    With ``delay_steps``, which is asked at every question, the answer is shown only that many
    control steps later, and the clock counts control steps of ``period_ms``: what happens does
    not depend on the speed of the machine.
    """

    def __init__(
        self, delay_steps: Callable[[], int] | None = None, period_ms: float | None = None
    ) -> None:
        self._delay_steps, self._period_ms = delay_steps, period_ms

    def ask(self, question: Question, step: int) -> Answer:
        delay = 0 if self._delay_steps is None else self._delay_steps()
        answer = Answer(ready_at=step + delay)
        answer.run(question)
        return answer

    def now_ms(self, step: int) -> float:
        return time.perf_counter() * 1000 if self._period_ms is None else step * self._period_ms

    def close(self) -> None:
        pass


class BackgroundAsker:
    """Asks from one thread of its own, so that the robot's loop never waits for an answer."""

    def __init__(self) -> None:
        self._questions: _Questions = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, question: Question, step: int) -> Answer:
        if self._thread is None or not self._thread.is_alive():
            self._questions = queue.SimpleQueue()  # one that was closed may still end its last
            # A daemon: a server that never answers must not keep the program from ending.
            self._thread = threading.Thread(
                target=_answer_all, args=(self._questions,), name="chunk-asker", daemon=True
            )
            self._thread.start()
        answer = Answer()
        self._questions.put((answer, question))
        return answer

    def now_ms(self, step: int) -> float:
        return time.perf_counter() * 1000

    def close(self) -> None:
        if self._thread is not None:
            self._questions.put(None)
            self._thread.join(_JOIN_SECONDS)
            self._thread = None


_Questions: TypeAlias = "queue.SimpleQueue[tuple[Answer, Question] | None]"


def _answer_all(questions: _Questions) -> None:
    while (item := questions.get()) is not None:
        answer, question = item
        answer.run(question)
