"""Executors by name, for settings and command lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.client.executors.asynchronous import AsynchronousExecutor
from reflexarc.client.executors.base import ChunkExecutor
from reflexarc.client.executors.guard import RobotGuard
from reflexarc.client.executors.real_time_chunking import RealTimeChunkingExecutor
from reflexarc.client.executors.receding_horizon import RecedingHorizonExecutor
from reflexarc.client.executors.temporal_ensembling import TemporalEnsemblingExecutor

ExecutorName = Literal[
    "receding_horizon", "temporal_ensembling", "asynchronous", "real_time_chunking"
]
EXECUTORS: dict[ExecutorName, Callable[[ChunkPolicy, int, RobotGuard | None], ChunkExecutor]] = {
    "receding_horizon": RecedingHorizonExecutor,
    "temporal_ensembling": TemporalEnsemblingExecutor,
    "asynchronous": AsynchronousExecutor,
    "real_time_chunking": RealTimeChunkingExecutor,
}


def make_executor(
    name: ExecutorName, policy: ChunkPolicy, replan_steps: int, guard: RobotGuard | None = None
) -> ChunkExecutor:
    """An executor with its own defaults for everything but the steps between two requests."""
    return EXECUTORS[name](policy, replan_steps, guard)
