"""The load generator's processes: started together, measured together."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import numpy as np

from reflexarc.client.load.echo_server import EchoServer
from reflexarc.client.load.settings import LoadSettings
from reflexarc.client.load.summary import LoadSummary, summarise
from reflexarc.client.load.worker import LoadWorker, Samples
from reflexarc.contract import PROTOCOL_VERSION, ActionChunk, PolicyContract, ReflexarcError, pack
from reflexarc.contract.errors import ServerUnavailableError

CEILING_SECONDS = 1.0
_START_SECONDS = 0.2  # after the last process is ready


def run_load(settings: LoadSettings, *, ceiling: bool = True) -> LoadSummary:
    """Put the load on the server and sum up what came back.

    Args:
        settings: see there.
        ceiling: whether to measure first how many of these requests the generator alone can send
            a second, to a server beside it that reads nothing and answers at once.

    Raises:
        ServerUnavailableError: a client could not connect, or a process of the generator died.
        CodecError: what answers is no reflexarc server of this version.
    """
    with _Generator(settings, check=True) as generator:
        contract = generator.contract
        most = _ceiling(settings, contract) if ceiling else None
        samples = generator.run()
    return summarise(settings, contract, samples, most)


def _ceiling(settings: LoadSettings, contract: PolicyContract) -> float:
    """Requests a second in a closed loop against the echo server."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    echo = context.Process(target=_serve_echo, args=(there, contract), daemon=True)
    echo.start()
    try:
        there.close()  # so that an echo server that dies is an EOFError here
        alone = replace(
            settings,
            server=f"ws://127.0.0.1:{here.recv()}",
            headers={},
            rate=None,
            think_ms=0.0,
            deadline_ms=None,
            seconds=CEILING_SECONDS,
            warm_up_seconds=0.5,
        )
        with _Generator(alone, check=False) as generator:
            return summarise(alone, contract, generator.run(), None).throughput
    finally:
        echo.kill()
        echo.join()


class _Generator:
    """Worker processes with their connections open, ready to run once."""

    def __init__(self, settings: LoadSettings, *, check: bool) -> None:
        self._settings, self._check = settings, check
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> _Generator:
        context = multiprocessing.get_context("spawn")
        shares = np.array_split(np.arange(self._settings.clients), self._settings.worker_count)
        try:
            for share in shares:
                here, there = context.Pipe()
                process = context.Process(
                    target=_work,
                    args=(there, self._settings, int(share[0]), len(share), self._check),
                    daemon=True,
                )
                process.start()
                there.close()
                self._workers.append((process, here))
            contracts = [self._receive(pipe) for _, pipe in self._workers]
        except BaseException:
            self._end()
            raise
        self.contract: PolicyContract = contracts[0]
        return self

    def run(self) -> list[Samples]:
        start = time.monotonic() + _START_SECONDS
        for _, pipe in self._workers:
            pipe.send(start)
        return [self._receive(pipe) for _, pipe in self._workers]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def _receive(self, pipe: Connection) -> Any:
        try:
            result = pipe.recv()
        except EOFError as error:
            raise ServerUnavailableError("a process of the load generator died") from error
        if isinstance(result, ReflexarcError):
            raise result
        return result


def _work(pipe: Connection, settings: LoadSettings, first: int, clients: int, check: bool) -> None:
    """A worker process: says its contract, waits for the start time, sends its samples."""
    try:
        asyncio.run(_work_on_loop(pipe, LoadWorker(settings, first, clients, check=check)))
    except ReflexarcError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has ended


async def _work_on_loop(pipe: Connection, worker: LoadWorker) -> None:
    pipe.send(await worker.connect())
    start = await asyncio.to_thread(pipe.recv)
    await worker.run(start)
    pipe.send(worker.samples)
    await worker.close()


def _serve_echo(pipe: Connection, contract: PolicyContract) -> None:
    action = contract.action
    chunk = ActionChunk(np.zeros((action.horizon, action.dimension), np.float32), seed=0)
    greeting = {
        "protocol": "reflexarc",
        "protocol_version": PROTOCOL_VERSION,
        "contract": contract.model_dump(mode="json"),
    }

    async def serve() -> None:
        pipe.send(await EchoServer(pack(greeting), pack(chunk.to_wire())).start())
        await asyncio.Event().wait()

    asyncio.run(serve())
