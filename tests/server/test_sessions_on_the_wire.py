"""Sessions as clients see them: seeds of an episode, resets, stale replies, reconnecting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from reflexarc.contract import ActionChunk, Observation, pack, unpack
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.episodes import Episodes

MakeObservation = Callable[..., Observation]


def opened(server: BackgroundServer) -> ClientConnection:
    connection = connect(f"{server.url}/v1/policy", compression=None)
    connection.recv(timeout=10)
    return connection


def asked(connection: ClientConnection, message: Any) -> Any:
    connection.send(pack(message.to_wire() if isinstance(message, Observation) else message))
    return unpack(connection.recv(timeout=10))


def seeds_of_an_episode(
    connection: ClientConnection, make: MakeObservation, seed: int | None, **fields: Any
) -> list[int]:
    first = asked(connection, make(seed=seed, step_index=0, **fields))
    later = [asked(connection, make(seed=None, step_index=step, **fields)) for step in (4, 8)]
    return [reply["seed"] for reply in (first, *later)]


def test_a_seed_at_the_start_makes_a_whole_episode_repeatable(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with opened(null_server) as one, opened(null_server) as other:
        seeds = seeds_of_an_episode(one, make_observation, 5)
        assert seeds[0] == 5
        assert len(set(seeds)) == 3, "each decision has noise of its own"
        assert seeds_of_an_episode(other, make_observation, 5, session_id="named") == seeds
        assert seeds_of_an_episode(one, make_observation, 6) != seeds
        drawn = seeds_of_an_episode(one, make_observation, None)
        assert drawn != seeds_of_an_episode(one, make_observation, None)
        assert asked(one, make_observation(seed=77, step_index=4))["seed"] == 77


def test_an_episode_goes_on_over_another_connection(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with opened(null_server) as connection:
        asked(connection, make_observation(seed=5, step_index=0, session_id="robot"))
        expected = asked(connection, make_observation(seed=None, step_index=4, session_id="robot"))
    with opened(null_server) as connection:
        reply = asked(connection, make_observation(seed=None, step_index=4, session_id="robot"))
        assert reply["seed"] == expected["seed"]
        assert reply["session_id"] == "robot"
        assert np.array_equal(reply["actions"], expected["actions"])


def test_sessions_share_nothing(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with opened(null_server) as connection:
        for session, seed in (("a", 1), ("b", 2)):
            asked(connection, make_observation(seed=seed, step_index=0, session_id=session))
        a, b = (
            asked(connection, make_observation(seed=None, step_index=4, session_id=session))
            for session in ("a", "b")
        )
        assert a["seed"] != b["seed"]
        asked(connection, {"reset": True, "session_id": "a"})
        again = asked(connection, make_observation(seed=None, step_index=4, session_id="b"))
        assert again["seed"] == b["seed"], "the reset of another session changes nothing"


def test_reset_is_answered_with_its_ids(
    null_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with opened(null_server) as connection:
        asked(connection, make_observation(session_id="gone", step_index=3))
        message = {"reset": True, "session_id": "gone", "request_id": "r"}
        assert asked(connection, message) == {**message, "ended": True}
        assert asked(connection, message) == {**message, "ended": False}
        assert asked(connection, {"reset": True}) == {"reset": True, "ended": False}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"reset": 1}, "reset"),
        ({"reset": True, "state": 3}, "reset"),
        ({"reset": True, "session_id": 4}, "session_id"),
        ({"reset": True, "session_id": "x" * 200}, "session_id"),
    ],
)
def test_wrong_reset_is_named_and_the_connection_lives(
    null_server: BackgroundServer, make_observation: MakeObservation, message: Any, field: str
) -> None:
    with opened(null_server) as connection:
        error = asked(connection, message)["error"]
        assert (error["code"], error["field"]) == ("codec", field)
        assert "actions" in asked(connection, make_observation())


class HeldPolicy(NullPolicy):
    """Holds every inference until ``may_go``; remembers the sessions that were ended."""

    cheap = False

    def __init__(self) -> None:
        super().__init__(libero_contract())
        self.started, self.may_go = threading.Event(), threading.Event()
        self.asked: list[int | None] = []
        self.ended: list[str] = []

    def infer(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        self.asked += [observation.seed for observation in observations]
        self.started.set()
        assert self.may_go.wait(20)
        return super().infer(observations)

    def end_session(self, session_id: str) -> bool:
        self.ended.append(session_id)
        return True


@pytest.mark.parametrize("how", ["reset", "delete", "step 0"])
def test_a_reply_to_an_episode_that_was_reset_is_withheld(
    make_observation: MakeObservation, how: str
) -> None:
    """One request of the old episode runs when it is reset, another waits."""
    policy = HeldPolicy()
    with (
        BackgroundServer(lambda: policy) as server,
        opened(server) as running,
        opened(server) as waiting,
        opened(server) as other,
        httpx.Client(base_url=server.http_url, timeout=20) as http,
    ):
        old = make_observation(seed=1, session_id="episode", step_index=8, request_id="old")
        running.send(pack(old.to_wire()))
        assert policy.started.wait(10)
        waiting.send(pack({**old.to_wire(), "seed": 2, "request_id": "older"}))
        while server.service.waiting < 2:
            pass
        begun = threading.Thread(target=lambda: http.delete("/v1/sessions/episode"))
        if how == "reset":
            other.send(pack({"reset": True, "session_id": "episode"}))
        elif how == "delete":
            begun.start()
        else:
            new = make_observation(seed=3, session_id="episode", step_index=0)
            other.send(pack(new.to_wire()))
        while not server.service._episodes._episodes["episode"].number:
            pass
        policy.may_go.set()
        for connection, request_id in ((running, "old"), (waiting, "older")):
            reply = unpack(connection.recv(timeout=10))
            assert reply["error"]["code"] == "stale_reply"
            assert reply["request_id"] == request_id
        if how == "delete":
            begun.join(20)
        else:
            answer = unpack(other.recv(timeout=10))
            assert answer.get("ended", True) and answer.get("seed", 3) == 3
        assert 2 not in policy.asked, "nothing is computed for an episode that is over"
        assert ("episode" in policy.ended) == (how != "step 0")


def test_idle_sessions_are_forgotten() -> None:
    now = [0.0]
    episodes = Episodes(idle_seconds=60, clock=lambda: now[0])
    _, seed = episodes.admit("s", 0, 5)
    assert seed == 5
    now[0] = 59.0
    assert episodes.admit("s", 4, None)[1] is not None
    now[0] = 120.0
    assert episodes.admit("s", 8, None)[1] is None, "its seed is gone"
    assert len(episodes) == 1


def test_sessions_are_bounded() -> None:
    episodes = Episodes()
    for number in range(5000):
        episodes.admit(f"session {number}", 0, 1)
    assert len(episodes) <= 1024
