"""Observations as a contract wants them, packed ahead so that sending costs little."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from reflexarc.client.history import HistoryRecorder
from reflexarc.contract import Observation, PolicyContract, pack

EPISODE_REQUESTS = 25
_REQUEST_ID = "bench-00000-000000000000"
_DEADLINE_MS = 123456.78901234567


class RequestStream:
    """One client's requests.

    A policy without history gets one packed frame in which only request id and deadline change.
    One with history gets episodes: each request carries what a robot would have seen since the
    one before, and is packed when it is due.

    Args:
        contract: the server's.
        client: index of the client, part of the request ids.
        instruction: of every request, where the policy needs one.
        deadline: whether requests carry a deadline.
        seed: of pixels and state.
    """

    def __init__(
        self, contract: PolicyContract, client: int, *, instruction: str, deadline: bool, seed: int
    ) -> None:
        self._contract, self._client, self._deadline = contract, client, deadline
        rng = np.random.default_rng((seed, client))
        self._seen = Observation(
            images={
                camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
                for camera in contract.cameras
            },
            state=rng.uniform(-0.1, 0.1, contract.state.dimension),
            instruction=instruction if contract.needs_language else None,
            seed=int(rng.integers(1 << 31)),
        )
        self._count = 0
        self._replan = max(1, contract.action.horizon // 2)
        self._episode: HistoryRecorder | None = None
        self._step = 0
        self._frame = bytearray() if contract.needs_session else self._template()

    def next(self, deadline_ms: float | None) -> tuple[str, bytes | bytearray]:
        """The next request's id and frame. The frame is good until the next call."""
        request_id = f"bench-{self._client:05d}-{self._count:012d}"
        self._count += 1
        if self._contract.needs_session:
            return request_id, self._next_of_episode(request_id, deadline_ms)
        self._frame[self._id_at : self._id_at + len(request_id)] = request_id.encode()
        if deadline_ms is not None:
            self._frame[self._deadline_at : self._deadline_at + 8] = struct.pack(">d", deadline_ms)
        return request_id, self._frame

    def restart(self) -> None:
        """Begin a new episode: the connection, and its session, are new."""
        self._episode = None

    def _template(self) -> bytearray:
        options: dict[str, Any] = {"deadline_ms": _DEADLINE_MS} if self._deadline else {}
        observation = replace(self._seen, request_id=_REQUEST_ID, **options)
        frame = bytearray(pack(observation.to_wire()))
        self._id_at = frame.rindex(_REQUEST_ID.encode())  # images stand before it
        if self._deadline:
            self._deadline_at = frame.rindex(struct.pack(">d", _DEADLINE_MS))
        return frame

    def _next_of_episode(self, request_id: str, deadline_ms: float | None) -> bytes:
        if self._episode is None or self._step >= EPISODE_REQUESTS * self._replan:
            self._episode, self._step = HistoryRecorder(self._contract, self._replan), 0
        options: dict[str, Any] = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
        goal: Mapping[str, Any] | None = None
        if self._contract.needs_goal_image and self._step == 0:
            goal = self._seen.images
        now = replace(
            self._seen, request_id=request_id, step_index=self._step, goal_image=goal, **options
        )
        sent = self._episode.request(now)
        self._episode.answered(now)
        for after in range(1, self._replan):
            if self._episode.needs_state(after) or self._episode.needs_images(after):
                images = self._seen.images if self._episode.needs_images(after) else None
                self._episode.record(self._step + after, self._seen.state, images)
        self._step += self._replan
        return pack(sent.to_wire())
