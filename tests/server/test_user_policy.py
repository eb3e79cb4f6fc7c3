"""A user's own class behind the server, asked over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError, ContractViolationError, InferenceError
from reflexarc.server import BackgroundServer, libero_contract
from reflexarc.server.user_policy import UserPolicy, check_policy_class

MakeObservation = Callable[..., Observation]
CONTRACT = libero_contract(horizon=4)


class Scripted:
    """Returns or raises what the instruction names, so that one server shows every case."""

    contract = CONTRACT
    good = np.full((4, 7), 0.25)
    answers: ClassVar[dict[str, Any]] = {
        "float64": good,
        "float16": good.astype(np.float16),
        "chunk": ActionChunk(good.astype(np.float32), seed=0, timing={"mine_ms": 2.0, "x": 1j}),
        "limit": np.ones((4, 7)),
        "list": good.tolist(),
        "none": None,
        "integers": np.ones((4, 7), int),
        "objects": np.full((4, 7), None),
        "complex": np.full((4, 7), 1j),
        "short": good[:3],
        "flat": good[0],
        "nan": np.where(np.eye(4, 7, dtype=bool), np.nan, 0.0),
        "infinite": np.full((4, 7), np.inf),
        "outside": good * 5,
        "raises": ValueError("no idea"),
        "stops": StopIteration(),
        "exits": SystemExit(3),
        "cancels": asyncio.CancelledError(),
        "refuses": ContractViolationError("the lamp is off", field="images.agentview"),
    }

    def infer(self, observation: Observation) -> Any:
        answer = self.answers.get(observation.instruction or "", self.good)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture(scope="module")
def scripted_server() -> Any:
    with BackgroundServer(lambda: UserPolicy(Scripted, "my_module:Scripted")) as server:
        yield server


@pytest.mark.parametrize("client_class", [PolicyClient, HttpPolicyClient])
@pytest.mark.parametrize("answer", ["float64", "float16", "chunk"])
def test_good_actions_arrive(
    scripted_server: BackgroundServer,
    make_observation: MakeObservation,
    client_class: type[Any],
    answer: str,
) -> None:
    with client_class(scripted_server.url) as client:
        chunk = client.infer(make_observation(instruction=answer, request_id="r"))
    assert chunk.actions.dtype == np.float32
    np.testing.assert_array_equal(chunk.actions, np.full((4, 7), 0.25, np.float32))
    assert (chunk.seed, chunk.request_id) == (7, "r")
    assert ("mine_ms" in chunk.timing) == (answer == "chunk")


REFUSED = {
    "list": "returned a list",
    "none": "returned a NoneType",
    "integers": "astype(np.float32)",
    "objects": "returned object",
    "complex": "returned complex128",
    "short": "returned an array (3, 7)",
    "flat": "returned an array (7,)",
    "nan": "nan for delta_x in row 0",
    "infinite": "inf for delta_x",
    "outside": "1.25 for delta_x in row 0, outside -1 to 1",
    "raises": "error id",
    "stops": "error id",
    "exits": "raised SystemExit",
    "cancels": "raised CancelledError",
}


@pytest.mark.parametrize("client_class", [PolicyClient, HttpPolicyClient])
def test_bad_actions_never_leave_and_the_server_lives_on(
    scripted_server: BackgroundServer, make_observation: MakeObservation, client_class: type[Any]
) -> None:
    with client_class(scripted_server.url) as client:
        for answer, expected in REFUSED.items():
            with pytest.raises(InferenceError) as refused:
                client.infer(make_observation(instruction=answer))
            assert expected in refused.value.message, answer
        with pytest.raises(ContractViolationError, match="the lamp is off"):
            client.infer(make_observation(instruction="refuses"))
        assert client.infer(make_observation(instruction="limit")).actions.max() == 1


def test_observation_that_violates_the_contract_never_reaches_the_class(
    scripted_server: BackgroundServer, make_observation: MakeObservation
) -> None:
    with (
        PolicyClient(scripted_server.url) as client,
        pytest.raises(ContractViolationError, match="resize it"),
    ):
        client.infer(make_observation(size=96))


class Counting:
    """Answers with how many observations its session has sent."""

    contract = CONTRACT

    def __init__(self) -> None:
        self.resets: list[str | None] = []
        self.count: dict[str | None, int] = {}

    def reset(self, session_id: str | None) -> None:
        self.resets.append(session_id)
        self.count[session_id] = 0

    def infer(self, observation: Observation) -> np.ndarray[Any, Any]:
        self.count[observation.session_id] += 1
        return np.full((4, 7), self.count[observation.session_id] / 100)


def test_reset_is_called_where_a_session_begins(make_observation: MakeObservation) -> None:
    inference = UserPolicy(Counting, "m:Counting")
    inference.warm_up()

    def ask(client: PolicyClient, session: str, step: int) -> int:
        observation = make_observation(session_id=session, step_index=step)
        return round(float(client.infer(observation).actions[0, 0]) * 100)

    with BackgroundServer(lambda: inference) as server, PolicyClient(server.url) as client:
        assert [ask(client, "a", step) for step in (0, 4, 8)] == [1, 2, 3]
        assert ask(client, "b", 20) == 1, "a session that is new begins, at whatever step"
        assert ask(client, "a", 12) == 4, "another session between does not end this one"
        assert ask(client, "a", 0) == 1, "step 0 begins again"


def test_results_name_the_version_of_the_class() -> None:
    plain = UserPolicy(Counting, "m:Counting").contract
    assert plain == UserPolicy(Counting, "m:Counting").contract
    assert plain.checkpoint_fingerprint
    assert plain.checkpoint_fingerprint != UserPolicy(Scripted, "m").contract.checkpoint_fingerprint

    class Own(Counting):
        contract = CONTRACT.model_copy(update={"checkpoint_fingerprint": "v7"})

    assert UserPolicy(Own, "m:Own").contract.checkpoint_fingerprint == "v7"


def test_warm_up_refuses_a_class_whose_actions_cannot_be_sent() -> None:
    class Wrong(Scripted):
        good = np.zeros((3, 7))

    server = BackgroundServer(lambda: UserPolicy(Wrong, "m:Wrong"))
    with pytest.raises(InferenceError, match=r"m:Wrong\.infer returned an array \(3, 7\)"):
        server.__enter__()


def test_own_warm_up_takes_the_place_of_the_trial(make_observation: MakeObservation) -> None:
    class Warms(Scripted):
        warmed = 0

        def warm_up(self) -> None:
            type(self).warmed += 1

        def infer(self, observation: Observation) -> Any:
            assert observation.images["agentview"].any(), "it was asked about black images"
            return super().infer(observation)

    with (
        BackgroundServer(lambda: UserPolicy(Warms, "m:Warms")) as server,
        PolicyClient(server.url) as client,
    ):
        assert Warms.warmed == 1
        client.infer(make_observation(pixels=1))


def test_a_class_that_cannot_read_black_images_is_served(
    make_observation: MakeObservation, caplog: pytest.LogCaptureFixture
) -> None:
    class Looks(Scripted):
        def infer(self, observation: Observation) -> Any:
            if not observation.images["agentview"].any():
                raise ZeroDivisionError("no light")
            return super().infer(observation)

    with (
        BackgroundServer(lambda: UserPolicy(Looks, "m:Looks")) as server,
        PolicyClient(server.url) as client,
    ):
        client.infer(make_observation(pixels=1))
    assert "m:Looks raised on black images" in caplog.text


class NoContract:
    def infer(self, observation: Observation) -> None: ...


class ContractAsMap(NoContract):
    contract = CONTRACT.model_dump()


class TakesArguments(Scripted):
    def __init__(self, gain: float, target: str = "x") -> None:
        self.contract = CONTRACT
        if gain < 0:
            raise ValueError("gain must be positive")
        if gain == 0:
            raise SystemExit("no")


@pytest.mark.parametrize(
    ("policy_class", "config", "expected"),
    [
        (NoContract, None, r"needs an attribute 'contract'.*found none"),
        (ContractAsMap, None, "found a dict"),
        (TakesArguments, None, r"no arguments: missing a required argument: 'gain'"),
        (TakesArguments, {"gain": 1, "aim": 2}, "unexpected keyword argument 'aim'"),
        (TakesArguments, {"gain": -1}, "raised ValueError: gain must be positive"),
        (TakesArguments, {"gain": 0}, "raised SystemExit"),
    ],
)
def test_a_class_that_cannot_be_built_is_named(
    policy_class: type[Any], config: dict[str, Any] | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        UserPolicy(policy_class, "m:C", config)


def test_config_is_given_as_keyword_arguments() -> None:
    contract = UserPolicy(TakesArguments, "m:C", {"gain": 1.0}).contract
    other = UserPolicy(TakesArguments, "m:C", {"gain": 2.0}).contract
    assert isinstance(contract, PolicyContract)
    assert contract.checkpoint_fingerprint != other.checkpoint_fingerprint


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Scripted(), "not a class"),
        (len, "not a class"),
        (int, "no method infer"),
        (type("Async", (), {"infer": asyncio.sleep}), "async"),
    ],
)
def test_what_is_no_policy_class_is_refused(found: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_policy_class("m:C", found)
