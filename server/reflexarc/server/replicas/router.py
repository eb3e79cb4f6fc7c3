"""Ray Serve's choice of a replica for a request: that of its session.

Ray's own ConsistentHashRouter would do the same without regard to load: of eight robots on two
replicas it often gives one of them six. Sessions here are few and each is a steady load, so they
are spread evenly, and stay where they are.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from reflexarc.server.replicas.placement import Placement


class SessionRouter(RequestRouter):  # type: ignore[misc]
    """Sends a request to its session's replica, and one without a session to the least busy.

    A full replica is waited for: another one would lack what is kept of the session. How many may
    wait is Serve's ``max_queued_requests``.
    """

    # Of a replica that is asked how busy it is: its machine may be busy too.
    queue_len_response_deadline_s = 1.0

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._placement = Placement()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Candidates in ranks; Serve asks the least busy of the first rank, and then again."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        session = pending_request.metadata.session_id
        if not session:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        options = pending_request.kwargs
        name = self._placement.choose(
            session, tuple(by_name), may_move=bool(options.get("may_move"))
        )
        if options.get("ends"):
            self._placement.end(session)
        return [[by_name[name]]]
