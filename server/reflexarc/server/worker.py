"""One thread that runs everything that touches the policy, in the order in which it was asked."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Worker:
    """Like a ThreadPoolExecutor of one thread, with two differences.

    A hand-over costs two thirds; and the thread is a daemon, so that an inference that never ends
    does not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def post(self, job: Callable[[], object]) -> None:
        """Run ``job``, which tells by itself what came of it."""
        self._jobs.put(job)

    def run(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """A future of the running event loop with what ``work`` returns or raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self.post(partial(_run, loop, future, work))
        return future

    def close(self) -> None:
        """Let the thread end after what was asked before."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except RuntimeError as error:
                # The event loop has ended; nobody waits for results any more.
                logger.debug("a result has nowhere to go: %s", error)
            except BaseException:
                logger.exception("a job of the worker thread failed")
            del job  # hold no frame while waiting


def _run(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], work: Callable[[], Any]
) -> None:
    if future.cancelled():
        return
    result, error = None, None
    try:
        result = work()
    except BaseException as raised:
        error = raised
    loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
