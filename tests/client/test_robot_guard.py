"""The guard: limits, old chunks, servers that go away, and that it says what it did."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reflexarc.client import (
    EXECUTORS,
    AsynchronousExecutor,
    ExecutorName,
    LatencyInjected,
    PolicyClient,
    RecedingHorizonExecutor,
    RobotGuard,
    make_executor,
)
from reflexarc.client.executors import RobotStoppedError
from reflexarc.contract import ActionChunk, Observation
from reflexarc.contract.errors import (
    ConfigError,
    ContractViolationError,
    DeadlineExceededError,
    ServerUnavailableError,
)
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract
from reflexarc.server.null_policy import ZeroPolicy

MakeObservation = Callable[..., Observation]
CONTRACT = libero_contract(horizon=10)
every_executor = pytest.mark.parametrize("name", EXECUTORS)
numbers = st.floats(-3, 3, width=32)
actions = arrays(np.float32, 7, elements=numbers)


@given(action=actions, low=arrays(np.float32, 7, elements=st.floats(-2, 0, width=32)),
       high=arrays(np.float32, 7, elements=st.floats(0, 2, width=32)))  # fmt: skip
@settings(deadline=None)
def test_what_goes_out_is_inside_both_limits_and_as_near_as_can_be(
    action: Any, low: Any, high: Any
) -> None:
    low[6], high[6] = -2, 2
    guard = RobotGuard(CONTRACT, low=low, high=high)
    out = guard.execute(action, step=0)
    inside_low, inside_high = np.maximum(low, -1), np.minimum(high, 1)
    assert out.dtype == np.float32
    assert (out >= inside_low).all() and (out <= inside_high).all()
    nearest = [min(max(a, lo), hi) for a, lo, hi in zip(action, inside_low, inside_high)]  # noqa: B905
    np.testing.assert_array_equal(out, np.array(nearest, np.float32))
    assert guard.counts["clamped"] == (not np.array_equal(out, action))
    np.testing.assert_array_equal(guard.execute(out, step=1), out)
    safe = guard.hold(step=2)
    np.testing.assert_array_equal(safe[:6], 0)
    assert safe[6] == out[6]  # the gripper keeps what it was told last


@given(action=actions, bad=st.sampled_from([np.nan, np.inf, -np.inf]), where=st.integers(0, 6))
def test_what_is_not_finite_is_never_executed(action: Any, bad: float, where: int) -> None:
    guard = RobotGuard(CONTRACT)
    guard.execute(np.array([0, 0, 0, 0, 0, 0, 1.0]), step=0)
    action[where] = bad
    np.testing.assert_array_equal(guard.execute(action, step=1), [0, 0, 0, 0, 0, 0, 1])
    assert guard.counts["not_finite"] == 1
    assert CONTRACT.action.names[where] in guard.events[-1].detail


@pytest.mark.parametrize(
    "arguments,field",
    [
        ({"low": [-1] * 6}, "low"),
        ({"low": [np.nan] * 7}, "low"),
        ({"low": [2.0] * 7}, "low"),
        ({"low": [0.1] * 7}, "limits"),
        ({"gripper_at_start": 3.0}, "limits"),
        ({"max_age_ms": -1}, "max_age_ms"),
        ({"max_age_steps": math.nan}, "max_age_steps"),
    ],
)
def test_limits_that_cannot_hold_are_named(arguments: Any, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RobotGuard(CONTRACT, **arguments)
    assert raised.value.field == field


class Steady:
    """Answers with a full motion and a closed gripper, or raises what it is told to."""

    contract = CONTRACT

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.asked = 0

    def infer(self, observation: Observation) -> ActionChunk:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        return ActionChunk(actions=np.ones((10, 7), np.float32), seed=0)


def look() -> Observation:
    return Observation(images={}, state=np.zeros(8), instruction="go")


def is_safe(action: Any) -> bool:
    return not action[:6].any()


@every_executor
def test_a_chunk_older_than_allowed_is_not_executed(name: ExecutorName) -> None:
    # Answers take 6 steps, so that actions are 6 to 15 steps old: only those up to 8 may be used.
    policy = LatencyInjected(Steady(), 300, in_steps=True)
    guard = RobotGuard(CONTRACT, max_age_steps=8)
    executor = make_executor(name, policy, 8, guard)
    safe = [is_safe(executor.next_action(look)) for _ in range(60)]
    for step in range(60):
        asked = [a for a in range(step + 1) if safe[a]]
        assert safe[step] or asked, "moved before any answer"
    moved = [step for step, is_held in enumerate(safe) if not is_held]
    assert moved and guard.counts["stale_chunk"] > 0
    assert guard.counts["waiting"] == sum(safe)
    assert guard.events[0].name == "waiting" and guard.events[0].step == 0
    assert "9 steps" in next(e for e in guard.events if e.name == "stale_chunk").detail


def test_the_age_of_executed_actions_never_exceeds_the_limit() -> None:
    class Stamped(Steady):
        def infer(self, observation: Observation) -> ActionChunk:
            rows = np.full((10, 7), (observation.step_index or 0) / 1000 + 0.1, np.float32)
            return ActionChunk(actions=rows, seed=0)

    for name in EXECUTORS:
        policy = LatencyInjected(Stamped(), 150, 150, in_steps=True, seed=3)
        executor = make_executor(name, policy, 10, RobotGuard(CONTRACT, max_age_steps=5))
        for step in range(100):
            action = executor.next_action(look)
            if not is_safe(action):
                asked_at = (float(action[0]) - 0.1) * 1000
                assert step - asked_at <= 5 + 1e-3, name


def test_the_age_in_milliseconds_counts_on_the_clock(observe: MakeObservation) -> None:
    guard = RobotGuard(CONTRACT, max_age_ms=100)
    policy = Steady()
    with RecedingHorizonExecutor(policy, 10, guard) as executor:
        assert not is_safe(executor.next_action(look))
        time.sleep(0.15)  # the loop was blocked
        executor.next_action(look)
        assert guard.counts["stale_chunk"] == 1 and policy.asked == 2


def test_the_age_begins_when_the_cameras_are_read() -> None:
    guard = RobotGuard(CONTRACT, max_age_ms=100)

    def slow_look() -> Observation:
        time.sleep(0.12)
        return look()

    with RecedingHorizonExecutor(Steady(), 10, guard) as executor:
        assert all(is_safe(executor.next_action(slow_look)) for _ in range(2))
    assert guard.counts["stale_chunk"] == 2


def test_a_robot_that_cannot_stand_still_is_driven_without_a_guard_alone() -> None:
    action = CONTRACT.action.model_copy(update={"low": (0.1,) * 6 + (-1.0,)})
    policy = Steady()
    policy.contract = CONTRACT.model_copy(update={"action": action})
    with pytest.raises(ConfigError, match="safe action"):
        RobotGuard(policy.contract)
    assert RecedingHorizonExecutor(policy, 5).next_action(look).tolist() == [1.0] * 7


def test_position_targets_are_held_where_they_are() -> None:
    action = CONTRACT.action.model_copy(update={"kind": "position"})
    policy = Steady()
    policy.contract = CONTRACT.model_copy(update={"action": action})
    with pytest.raises(ConfigError, match="hold_at_start"):
        RobotGuard(policy.contract)
    with pytest.raises(ConfigError, match="inside the limits"):
        RobotGuard(policy.contract, hold_at_start=[5.0] * 7)
    start, target = np.full(7, 0.25, np.float32), np.full(7, 0.5, np.float32)
    guard = RobotGuard(policy.contract, hold_at_start=start)
    assert guard.hold(0).tolist() == start.tolist()
    assert guard.execute(target, 1).tolist() == target.tolist()
    assert guard.execute(np.full(7, np.nan), 2).tolist() == target.tolist()
    assert guard.hold(3).tolist() == target.tolist()
    guard.reset()
    assert guard.hold(0).tolist() == start.tolist()
    with pytest.raises(ConfigError, match="position targets"):
        ZeroPolicy(policy.contract)


def test_without_a_guard_there_is_no_position_to_hold_before_the_first_action() -> None:
    action = CONTRACT.action.model_copy(update={"kind": "position"})
    guard = RobotGuard.limits_only(CONTRACT.model_copy(update={"action": action}))
    with pytest.raises(RobotStoppedError, match="hold_at_start"):
        guard.execute(np.full(7, np.nan), 0)


@pytest.mark.parametrize("name", ["receding_horizon", "asynchronous"])
def test_a_stop_lasts_until_it_is_released(name: ExecutorName) -> None:
    policy = Steady()
    guard = RobotGuard(CONTRACT, on_disconnect="stop")
    executor = make_executor(name, LatencyInjected(policy, 0, in_steps=True), 4, guard)
    assert not is_safe(executor.next_action(look))
    policy.fails = ServerUnavailableError("gone")
    held = [executor.next_action(look) for _ in range(12)]
    assert guard.stopped is not None and "gone" in guard.stopped
    policy.fails, asked = None, policy.asked
    held += [executor.next_action(look) for _ in range(5)]
    assert all(is_safe(action) and action[6] == 1 for action in held[-9:])
    assert policy.asked == asked, "a stopped robot has nothing to ask"
    guard.release()
    assert not is_safe(executor.next_action(look))
    assert [event.name for event in guard.events] == ["disconnected", "stopped", "reconnected"]


def test_a_chunk_from_before_the_stop_is_not_executed_after_it() -> None:
    policy = Steady()
    guard = RobotGuard(CONTRACT, max_age_steps=math.inf)
    executor = AsynchronousExecutor(LatencyInjected(policy, 200, in_steps=True), 8, guard)
    for _ in range(8):  # one chunk in hand, another under way
        executor.next_action(look)
    guard.stopped = "the operator's button"
    assert is_safe(executor.next_action(look))
    guard.release()
    asked = policy.asked
    assert [is_safe(executor.next_action(look)) for _ in range(5)] == [True] * 4 + [False]
    assert policy.asked == asked + 1


def test_stale_and_lost_can_be_raised() -> None:
    policy = Steady()
    guard = RobotGuard(CONTRACT, max_age_steps=1, on_stale="raise", on_disconnect="raise")
    executor = RecedingHorizonExecutor(LatencyInjected(policy, 100, in_steps=True), 8, guard)
    with pytest.raises(RobotStoppedError, match="2 steps"):
        for _ in range(5):
            executor.next_action(look)
    policy.fails = ServerUnavailableError("gone")
    executor = RecedingHorizonExecutor(policy, 8)
    with pytest.raises(ServerUnavailableError):
        executor.next_action(look)


@every_executor
def test_a_wrong_request_is_raised_whatever_the_guard(name: ExecutorName) -> None:
    policy = Steady()
    policy.fails = ContractViolationError("state: wrong", field="state")
    executor = make_executor(
        name, LatencyInjected(policy, 0, in_steps=True), 8, RobotGuard(CONTRACT)
    )
    with pytest.raises(ContractViolationError):
        executor.next_action(look)


def test_a_missed_deadline_leaves_what_is_in_hand() -> None:
    policy = Steady()
    guard = RobotGuard(CONTRACT)
    executor = AsynchronousExecutor(LatencyInjected(policy, 0, in_steps=True), 5, guard)
    assert not is_safe(executor.next_action(look))
    policy.fails = DeadlineExceededError("late")
    moved = [not is_safe(executor.next_action(look)) for _ in range(12)]
    assert moved == [True] * 9 + [False] * 3
    # Asked again at every step since five were left.
    assert guard.counts["missed_answer"] == 8 and guard.counts["disconnected"] == 0
    assert [event.name for event in guard.events] == ["missed_answer", "waiting"]
    policy.fails = None
    assert not is_safe(executor.next_action(look))


def test_a_server_that_dies_stops_the_arm_until_it_comes_back(
    server_process: Any, observe: MakeObservation
) -> None:
    server_process.start()
    with ExitStack() as stack:
        robots = []
        for name in EXECUTORS:
            client = stack.enter_context(PolicyClient(server_process.url, retry_for=0.2))
            # The null policy takes no prefix; without one it is asked as any other.
            policy = Forgetful(client) if name == "real_time_chunking" else client
            guard = RobotGuard(client.contract)
            replan = 1 if name == "temporal_ensembling" else 10
            robots.append(stack.enter_context(make_executor(name, policy, replan, guard)))

        def drive(until: Callable[[Any, Any], bool]) -> None:
            waiting = set(robots)
            for _ in range(1500):
                for executor in list(waiting):
                    action = executor.next_action(lambda: observe(deadline_ms=1000.0))
                    if until(executor, action):
                        waiting.remove(executor)
                if not waiting:
                    return
                time.sleep(0.01)
            pytest.fail(f"it never happened; {[e.guard.events for e in waiting]}")

        drive(lambda executor, action: not is_safe(action))
        server_process.kill()
        drive(lambda executor, action: executor.guard.counts["disconnected"] == 1)
        for executor in robots:
            first = executor.next_action(observe)
            for _ in range(5):
                held = executor.next_action(observe)
                assert is_safe(held) and held[6] == first[6]
        server_process.start()
        drive(lambda executor, action: not is_safe(action))
        for executor in robots:
            counts = executor.guard.counts
            assert counts["disconnected"] == counts["reconnected"] == 1


class Forgetful:
    """Leaves the prefix out."""

    def __init__(self, policy: PolicyClient) -> None:
        self._policy, self.contract = policy, policy.contract

    def infer(self, observation: Observation) -> ActionChunk:
        return self._policy.infer(replace(observation, action_prefix=None))


class Gated(NullPolicy):
    """Answers only while its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def infer(self, observations: Any) -> Any:
        assert self.gate.wait(20)
        return super().infer(observations)


def test_an_answer_of_the_last_episode_is_not_executed_in_the_next(
    observe: MakeObservation,
) -> None:
    policy = Gated()
    with BackgroundServer(lambda: policy) as server, PolicyClient(server.url) as client:
        guard = RobotGuard(client.contract)
        with AsynchronousExecutor(client, 8, guard) as executor:
            policy.gate.clear()
            assert is_safe(executor.next_action(lambda: observe(seed=1)))
            executor.reset()
            executor.next_action(lambda: observe(seed=2))
            policy.gate.set()
            action = executor.next_action(lambda: observe(seed=2))
            for _ in range(500):
                if not is_safe(action):
                    break
                time.sleep(0.01)
                action = executor.next_action(lambda: observe(seed=2))
            expected = NullPolicy().infer([observe(seed=2)])[0].actions[0]
            np.testing.assert_array_equal(action, expected)
            assert executor.chunks == 1


def test_receding_horizon_waits_no_longer_than_the_guard_allows(
    observe: MakeObservation,
) -> None:
    policy = Gated()
    with BackgroundServer(lambda: policy) as server, PolicyClient(server.url) as client:
        guard = RobotGuard(client.contract, max_wait_ms=50)
        with RecedingHorizonExecutor(client, 10, guard) as executor:
            policy.gate.clear()
            # Three steps go out although nobody answers.
            assert all(is_safe(executor.next_action(observe)) for _ in range(3))
            assert guard.counts["waiting"] == 3
            policy.gate.set()
            for _ in range(500):
                if not is_safe(executor.next_action(observe)):
                    return
                time.sleep(0.01)
            pytest.fail("the chunk never came")


def test_latency_is_waited_for_on_the_wall_clock() -> None:
    policy = LatencyInjected(Steady(), 60, 20)
    for _ in range(3):
        started = time.perf_counter()
        policy.infer(look())
        assert time.perf_counter() - started >= 0.04
