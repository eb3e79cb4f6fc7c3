"""Ask a served policy for action chunks and execute them. No torch, no simulator."""

from reflexarc.client.executors import (
    EXECUTORS,
    AsynchronousExecutor,
    ChunkExecutor,
    ChunkPolicy,
    ExecutorName,
    LatencyInjected,
    RealTimeChunkingExecutor,
    RecedingHorizonExecutor,
    RobotGuard,
    TemporalEnsemblingExecutor,
    make_executor,
)
from reflexarc.client.http_client import HttpPolicyClient
from reflexarc.client.websocket_client import PolicyClient

__all__ = [
    "EXECUTORS",
    "AsynchronousExecutor",
    "ChunkExecutor",
    "ChunkPolicy",
    "ExecutorName",
    "HttpPolicyClient",
    "LatencyInjected",
    "PolicyClient",
    "RealTimeChunkingExecutor",
    "RecedingHorizonExecutor",
    "RobotGuard",
    "TemporalEnsemblingExecutor",
    "make_executor",
]
