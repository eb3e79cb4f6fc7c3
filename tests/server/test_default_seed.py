"""``serve-policy --seed``: episodes repeat for clients that send no seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.contract import Observation
from reflexarc.server import BackgroundServer, NullPolicy
from reflexarc.server.episodes import decision_seed

SEED = 12
MakeObservation = Callable[..., Observation]


def seeds(client: Any, make_observation: MakeObservation, *fields: dict[str, Any]) -> list[int]:
    return [client.infer(make_observation(**{"seed": None, **given})).seed for given in fields]


@pytest.fixture(scope="module")
def url() -> Any:
    with BackgroundServer(NullPolicy, default_seed=SEED) as server:
        yield server.url


def test_decisions_of_a_connection_count_where_no_step_came(
    url: str, make_observation: MakeObservation
) -> None:
    for _ in range(2):  # a new connection begins anew
        with PolicyClient(url) as client:
            drawn = seeds(client, make_observation, {}, {}, {})
        assert drawn == [SEED, decision_seed(SEED, 1), decision_seed(SEED, 2)]
    assert len(set(drawn)) == 3


def test_the_step_decides_where_it_came(url: str, make_observation: MakeObservation) -> None:
    steps = [{"step_index": step} for step in (0, 8, 16, 0, 8)]
    expected = [decision_seed(SEED, given["step_index"]) for given in steps]
    with PolicyClient(url) as client:
        assert seeds(client, make_observation, *steps) == expected
    with PolicyClient(url) as client:  # an episode goes on over a new connection
        assert seeds(client, make_observation, {"step_index": 8}) == expected[1:2]


def test_http_without_a_session_has_the_steps_seed(
    url: str, make_observation: MakeObservation
) -> None:
    with HttpPolicyClient(url.replace("ws://", "http://")) as client:
        drawn = seeds(client, make_observation, {"step_index": 0}, {"step_index": 8})
    assert drawn == [SEED, decision_seed(SEED, 8)]


def test_a_requests_own_seed_goes_first(url: str, make_observation: MakeObservation) -> None:
    with PolicyClient(url) as client:
        given = [{"step_index": 0, "seed": 99}, {"step_index": 8}]
        assert seeds(client, make_observation, *given) == [99, decision_seed(99, 8)]


def test_without_it_every_seed_is_drawn(make_observation: MakeObservation) -> None:
    with BackgroundServer(NullPolicy) as server, PolicyClient(server.url) as client:
        assert len(set(seeds(client, make_observation, {}, {}, {}))) == 3
