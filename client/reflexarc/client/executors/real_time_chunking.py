"""Real-time chunking (Black, Galliker and Levine, 2025): a new chunk continues the one in hand."""

from __future__ import annotations

from dataclasses import replace

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.client.executors.asynchronous import AsynchronousExecutor
from reflexarc.client.executors.chunks import HeldChunk
from reflexarc.client.executors.guard import RobotGuard
from reflexarc.contract import Observation
from reflexarc.contract.errors import ConfigError


class RealTimeChunkingExecutor(AsynchronousExecutor):
    """Asks while moving, and sends the actions that will be executed meanwhile.

    They are committed: the request carries them as ``action_prefix``, the policy samples a chunk
    that begins with them, and exactly they are executed until it comes. How many they are is the
    most that one of the last ten answers took. What else is left of the chunk in hand travels as
    ``action_guide``, which the new chunk stays near, less and less: the soft mask.

    Args:
        policy: who is asked; its sampling must take a prefix.
        replan_steps, guard, ask_when_left: see :class:`AsynchronousExecutor`.
        soft: whether the guide is sent; None sends it where the policy says that it takes one.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        replan_steps: int,
        guard: RobotGuard | None = None,
        *,
        ask_when_left: int | None = None,
        soft: bool | None = None,
    ) -> None:
        sampling = getattr(policy, "metadata", {}).get("sampling", {})
        if not sampling.get("supports_prefix", True):
            raise ConfigError(
                f"the policy {policy.contract.family!r} samples whole chunks and takes no prefix, "
                "which real-time chunking needs; choose another executor",
                field="executor",
            )
        self._soft = bool(sampling.get("supports_guide")) if soft is None else soft
        super().__init__(policy, replan_steps, guard, ask_when_left=ask_when_left)

    def reset(self) -> None:
        super().reset()
        self._committed = 0

    def _request(self, observation: Observation) -> Observation:
        self._committed = 0
        if not self._chunks:
            return observation
        # Clamped now, because what is sent must be what is executed.
        rest = self.guard.clamp(self._chunks[-1].rest(self._executed))
        self._committed = min(len(rest), self.expected_delay, self._horizon - 1)
        prefix, guide = rest[: self._committed], rest[self._committed :]
        return replace(
            observation,
            action_prefix=prefix if len(prefix) else None,
            action_guide=guide if len(guide) and self._soft else None,
        )

    def _take(self, chunk: HeldChunk) -> None:
        if self._chunks and self._committed and chunk.row(self._executed) > self._committed:
            self.guard.note(
                "late_chunk",
                self._step,
                f"{chunk.row(self._executed)} actions were executed, {self._committed} were "
                "committed: the arm may jump",
            )
        super()._take(chunk)
