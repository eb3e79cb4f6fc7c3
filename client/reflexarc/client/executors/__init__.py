"""Execute chunks: when to ask, what of a chunk to execute, and what a robot must be spared."""

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.client.executors.asynchronous import AsynchronousExecutor
from reflexarc.client.executors.base import ChunkExecutor
from reflexarc.client.executors.guard import GuardEvent, RobotGuard, RobotStoppedError
from reflexarc.client.executors.latency import LatencyInjected
from reflexarc.client.executors.making import EXECUTORS, ExecutorName, make_executor
from reflexarc.client.executors.real_time_chunking import RealTimeChunkingExecutor
from reflexarc.client.executors.receding_horizon import RecedingHorizonExecutor
from reflexarc.client.executors.temporal_ensembling import TemporalEnsemblingExecutor

__all__ = [
    "EXECUTORS",
    "AsynchronousExecutor",
    "ChunkExecutor",
    "ChunkPolicy",
    "ExecutorName",
    "GuardEvent",
    "LatencyInjected",
    "RealTimeChunkingExecutor",
    "RecedingHorizonExecutor",
    "RobotGuard",
    "RobotStoppedError",
    "TemporalEnsemblingExecutor",
    "make_executor",
]
