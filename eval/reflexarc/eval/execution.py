"""How an evaluation executes chunks: which executor, asked how often, with which latency."""

from __future__ import annotations

from reflexarc.client import ChunkExecutor, ChunkPolicy, ExecutorName, LatencyInjected
from reflexarc.client.executors import make_executor


def evaluation_executor(
    name: ExecutorName, policy: ChunkPolicy, replan_steps: int, latency_ms: float
) -> ChunkExecutor:
    """An executor whose latency counts in control steps, whatever the machine's speed.

    Receding horizon without latency asks the policy directly: nothing can come later.
    """
    if name == "receding_horizon" and latency_ms == 0:
        return make_executor(name, policy, replan_steps)
    return make_executor(name, LatencyInjected(policy, latency_ms, in_steps=True), replan_steps)


def execution_in_words(executor: ExecutorName, replan_steps: int, latency_ms: float) -> str:
    """``replan every 8 steps``, with the executor and the latency where they are not the usual."""
    replan = f"replan every {replan_steps} steps" if replan_steps > 1 else "replan at every step"
    named = () if executor == "receding_horizon" else (executor.replace("_", " "),)
    latency = (f"injected latency {latency_ms:g} ms",) if latency_ms else ()
    return ", ".join((*named, replan, *latency))
