"""Which replica a session gets: sticky, even, and moved only where nothing is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from reflexarc.contract.errors import ConfigError
from reflexarc.server.replicas.placement import ACTIVE_SECONDS, KEPT_SECONDS, Placement
from reflexarc.server.replicas.settings import ReplicaCount, ReplicaSettings, parse_replicas


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def names(count: int, begin: int = 0) -> list[str]:
    return [f"session-{number}" for number in range(begin, begin + count)]


@pytest.mark.parametrize("sessions", [1, 2, 7, 8, 50, 1000])
@pytest.mark.parametrize("replicas", [("a",), ("a", "b"), ("a", "b", "c", "d", "e")])
def test_no_replica_has_more_than_its_share(sessions: int, replicas: tuple[str, ...]) -> None:
    placement = Placement(Clock())
    load = Counter(placement.choose(name, replicas) for name in names(sessions))
    assert max(load.values()) <= -(-sessions // len(replicas))
    assert sum(load.values()) == sessions


def test_a_session_stays_however_others_come_and_go() -> None:
    placement = Placement(Clock())
    first = {name: placement.choose(name, ("a", "b", "c")) for name in names(30)}
    for name in names(10):
        placement.end(name)
    for name in names(40, begin=100):
        placement.choose(name, ("c", "b", "a"))
    kept = {name: placement.choose(name, ("b", "a", "c")) for name in names(20, begin=10)}
    assert kept == {name: first[name] for name in kept}


def test_sessions_of_a_lost_replica_spread_over_the_others_and_the_rest_stay() -> None:
    placement = Placement(Clock())
    before = {name: placement.choose(name, ("a", "b", "c")) for name in names(30)}
    after = {name: placement.choose(name, ("a", "c")) for name in names(30)}
    assert all(after[name] == before[name] for name in before if before[name] != "b")
    assert Counter(after.values()) == {"a": 15, "c": 15}


def test_a_new_replica_gets_sessions_only_where_they_may_move() -> None:
    placement = Placement(Clock())
    for name in names(12):
        placement.choose(name, ("a", "b"))
    stuck = Counter(placement.choose(name, ("a", "b", "c")) for name in names(12))
    assert stuck == {"a": 6, "b": 6}
    moved = Counter(placement.choose(name, ("a", "b", "c"), may_move=True) for name in names(12))
    assert moved == {"a": 4, "b": 4, "c": 4}
    again = {name: placement.choose(name, ("a", "b", "c")) for name in names(12)}
    for name, replica in again.items():  # nothing moves without a reason
        assert placement.choose(name, ("a", "b", "c"), may_move=True) == replica


def test_silent_sessions_are_no_load_and_are_forgotten_later() -> None:
    clock = Clock()
    placement = Placement(clock)
    where = {name: placement.choose(name, ("a", "b")) for name in names(2)}
    clock.now = ACTIVE_SECONDS + 1
    assert Counter(placement.choose(name, ("a", "b")) for name in names(2, begin=10)) == {
        "a": 1,
        "b": 1,
    }
    assert placement.choose("session-0", ("a", "b")) == where["session-0"]
    clock.now += KEPT_SECONDS + 1
    placement.choose("another", ("a", "b"))
    assert len(placement) == 1


@pytest.mark.parametrize(("text", "least", "most"), [("1", 1, 1), ("4", 4, 4), ("1-8", 1, 8)])
def test_replicas_are_a_number_or_a_range(text: str, least: int, most: int) -> None:
    assert parse_replicas(text) == ReplicaCount(least, most)


@pytest.mark.parametrize("text", ["", "0", "-1", "8-1", "two", "1-", "1-2-3", "1025", "1.5", "²"])
def test_other_numbers_of_replicas_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--replicas") as refused:
        parse_replicas(text)
    assert refused.value.field == "replicas"


@pytest.mark.parametrize("gpus", [-0.5, 1.5])
def test_a_replica_takes_a_fraction_of_one_gpu_or_whole_ones(gpus: float) -> None:
    with pytest.raises(ConfigError, match="gpus-per-replica"):
        ReplicaSettings(ReplicaCount(1, 1), gpus=gpus)
