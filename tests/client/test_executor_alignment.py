"""Chunks that come late: every action in its turn, none twice, none skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflexarc.client import (
    EXECUTORS,
    AsynchronousExecutor,
    ExecutorName,
    LatencyInjected,
    RealTimeChunkingExecutor,
    RecedingHorizonExecutor,
    TemporalEnsemblingExecutor,
    make_executor,
)
from reflexarc.client.executors.chunks import ensemble, ensemble_weights
from reflexarc.contract import ActionChunk, Observation, PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.contract.policy_contract import Gripper
from reflexarc.server import libero_contract

HORIZON = 10
PERIOD_MS = 50.0
every_executor = pytest.mark.parametrize("name", EXECUTORS)
Array = npt.NDArray[np.float32]


def wide_contract(horizon: int = HORIZON) -> PolicyContract:
    """LIBERO's, with limits that let a count pass."""
    contract = libero_contract(horizon=horizon)
    action = contract.action.model_copy(update={"low": (-9999.0,) * 7, "high": (9999.0,) * 7})
    return contract.model_copy(update={"action": action})


class Counter:
    """Row r of a chunk is "the action after state + r": the state counts the actions executed."""

    def __init__(self, horizon: int = HORIZON) -> None:
        self.contract = wide_contract(horizon)
        self.asked: list[Observation] = []

    def infer(self, observation: Observation) -> ActionChunk:
        self.asked.append(observation)
        actions = np.zeros((self.contract.action.horizon, 7), np.float32)
        actions[:, 0] = observation.state[0] + np.arange(len(actions))
        actions[:, 1] = 1  # the safe action has 0 here
        actions[:, 6] = 1
        return ActionChunk(actions=actions, seed=0)


class Robot:
    """Executes: its state is the number of actions that were not the safe action."""

    def __init__(self) -> None:
        self.moved: list[float] = []
        self.held = 0

    def observe(self) -> Observation:
        state = np.array([len(self.moved), *[0.0] * 7])
        return Observation(images={}, state=state, instruction="count")

    def execute(self, action: Array) -> None:
        if action[1] == 0:
            self.held += 1
            np.testing.assert_array_equal(action[:6], 0)
        else:
            self.moved.append(float(action[0]))


def run(executor: Any, steps: int) -> Robot:
    robot = Robot()
    for _ in range(steps):
        robot.execute(executor.next_action(robot.observe))
    return robot


@every_executor
@given(
    latency=st.floats(0, 900),
    jitter=st.floats(0, 400),
    seed=st.integers(0, 9),
    replan=st.integers(1, HORIZON),
)
@settings(max_examples=60, deadline=None)
def test_every_action_comes_in_its_turn(
    name: ExecutorName, latency: float, jitter: float, seed: int, replan: int
) -> None:
    policy = LatencyInjected(Counter(), latency, jitter, in_steps=True, seed=seed)
    executor = make_executor(name, policy, replan)
    robot = run(executor, 80)
    assert robot.moved == list(range(len(robot.moved)))
    assert robot.held == executor.held == executor.guard.counts["waiting"]
    assert len(robot.moved) + robot.held == 80
    low, high = max(0.0, latency - jitter), latency + jitter
    for delay in executor.delays:
        assert low / PERIOD_MS - 1e-6 <= delay < high / PERIOD_MS + 1


@every_executor
@given(latency=st.integers(0, 20), replan=st.integers(1, HORIZON))
@settings(max_examples=40, deadline=None)
def test_holds_are_as_few_as_the_executor_allows(
    name: ExecutorName, latency: int, replan: int
) -> None:
    policy = LatencyInjected(Counter(), latency * PERIOD_MS, in_steps=True)
    robot = run(make_executor(name, policy, replan), 120)
    if name == "receding_horizon":  # stands still for every chunk
        cycle = [1] * latency + [0] * replan
        assert robot.held == sum((cycle * 120)[:120])
    elif name in ("asynchronous", "real_time_chunking") and 2 * latency <= HORIZON:
        # The first chunk has to be waited for; it says how early to ask for the others, but
        # where its own successor was asked for too late, it runs out once more.
        assert robot.held <= latency + max(0, latency - (HORIZON - replan))


@given(replan=st.integers(1, HORIZON))
@settings(max_examples=10, deadline=None)
def test_without_latency_asking_while_moving_is_receding_horizon(replan: int) -> None:
    asked = []
    for make in (RecedingHorizonExecutor, AsynchronousExecutor, RealTimeChunkingExecutor):
        policy = Counter()
        run(make(LatencyInjected(policy, 0, in_steps=True), replan), 50)
        asked.append([(o.step_index, o.action_prefix is None) for o in policy.asked])
    assert asked[0] == asked[1] == asked[2] == [(step, True) for step in range(0, 50, replan)]


def test_a_fixed_threshold_is_kept() -> None:
    policy = Counter()
    executor = AsynchronousExecutor(
        LatencyInjected(policy, 100, in_steps=True), 10, ask_when_left=3
    )
    robot = run(executor, 60)
    assert robot.held == 2  # for the first chunk
    # The first chunk has 10 actions, and 3 are left after 7; later ones begin 2 actions late.
    assert [o.state[0] for o in policy.asked[:4]] == [0, 7, 14, 21]


class Random:
    """A chunk that depends on the step alone, with a gripper that opens and closes."""

    def __init__(self, seed: int, horizon: int) -> None:
        self.contract = libero_contract(horizon=horizon)
        self._seed = seed

    def chunk(self, step: int) -> Array:
        draw = np.random.default_rng([self._seed, step])
        rows = draw.uniform(-1, 1, (self.contract.action.horizon, 7)).astype(np.float32)
        rows[:, 6] = np.where(rows[:, 6] > 0, 1, -1)
        return rows

    def infer(self, observation: Observation) -> ActionChunk:
        return ActionChunk(actions=self.chunk(observation.step_index or 0), seed=0)


@given(
    seed=st.integers(0, 99),
    horizon=st.integers(1, 12),
    every=st.integers(1, 12),
    decay=st.floats(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_ensembling_is_that_of_act(seed: int, horizon: int, every: int, decay: float) -> None:
    """Against ACT's own scheme: a table of all predictions by query and time, and its columns."""
    every, steps = min(every, horizon), 20
    policy = Random(seed, horizon)
    executor = TemporalEnsemblingExecutor(
        LatencyInjected(policy, 0, in_steps=True), every, decay=decay, gripper="average"
    )
    robot = Robot()
    table = np.full((steps, steps + horizon, 7), np.nan)
    for t in range(steps):
        action = executor.next_action(robot.observe)
        if t % every == 0:
            table[t, t : t + horizon] = policy.chunk(t)
        column = table[:, t][~np.isnan(table[:, t, 0])]
        weights = np.exp(-decay * np.arange(len(column)))
        expected = (column * weights[:, None]).sum(0) / weights.sum()
        np.testing.assert_allclose(action, expected, atol=1e-6)


@given(
    commands=st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=12),
    decay=st.floats(0, 3),
)
def test_the_gripper_is_voted_on(commands: list[float], decay: float) -> None:
    gripper = Gripper(index=1, open=-1, closed=1)
    rows = [np.array([0.5, command], np.float32) for command in commands]
    weights = ensemble_weights(len(rows), decay)
    assert weights.sum() == pytest.approx(1) and (np.diff(weights) <= 0).all()
    closed = sum(w for w, command in zip(weights, commands, strict=True) if command == 1)
    voted = ensemble(rows, decay, gripper, "vote")
    assert voted[1] in (-1.0, 1.0)
    if abs(closed - 0.5) > 1e-9:
        assert (voted[1] == 1) == (closed > 0.5)
    assert ensemble(rows, decay, gripper, "newest")[1] == commands[-1]
    assert ensemble(rows, decay, gripper, "average")[1] == pytest.approx(2 * closed - 1, abs=1e-6)


class Continuing(Random):
    """Begins its chunk with the prefix, as the server does."""

    metadata: ClassVar = {"sampling": {"supports_prefix": True, "supports_guide": True}}

    def __init__(self, seed: int, horizon: int) -> None:
        super().__init__(seed, horizon)
        self.asked: list[Observation] = []

    def infer(self, observation: Observation) -> ActionChunk:
        self.asked.append(observation)
        rows = self.chunk(observation.step_index or 0)
        if observation.action_prefix is not None:
            rows[: len(observation.action_prefix)] = observation.action_prefix
        return ActionChunk(actions=rows, seed=0)


@given(
    latency=st.floats(1, 700),
    jitter=st.floats(0, 300),
    seed=st.integers(0, 30),
    replan=st.integers(1, HORIZON),
    limit=st.floats(0.1, 1),
)
@settings(max_examples=60, deadline=None)
def test_a_prefix_is_executed_exactly_as_it_was_sent(
    latency: float, jitter: float, seed: int, replan: int, limit: float
) -> None:
    from reflexarc.client import RobotGuard

    policy = Continuing(seed, HORIZON)
    guard = RobotGuard(
        policy.contract,
        low=[-limit] * 6 + [-1],
        high=[limit] * 6 + [1],
        max_age_steps=10_000,
    )
    executor = RealTimeChunkingExecutor(
        LatencyInjected(policy, latency, jitter, in_steps=True, seed=seed), replan, guard
    )
    robot, actions, held, asked_at = Robot(), [], [], []
    for _ in range(100):
        before, holds = len(policy.asked), executor.held
        action = executor.next_action(robot.observe)
        asked_at += [len(actions)] * (len(policy.asked) - before)
        held.append(executor.held > holds)
        actions.append(action)
    sent = 0
    for index, delay in enumerate(executor.delays):
        prefix, at = policy.asked[index].action_prefix, asked_at[index]
        guide = policy.asked[index].action_guide
        if index:
            given = [len(rows) for rows in (prefix, guide) if rows is not None]
            assert sum(given) <= HORIZON
        if guide is not None:
            assert guide.dtype == np.float32 and np.abs(guide[:, :6]).max() <= np.float32(limit)
        if prefix is None:
            continue
        sent += 1
        assert prefix.dtype == np.float32 and 1 <= len(prefix) < HORIZON
        # What the robot did until the answer came is what was committed,
        executed = [actions[step] for step in range(at, at + delay) if not held[step]]
        for row, action in zip(prefix, executed, strict=False):
            np.testing.assert_array_equal(action, row)
        # and the chunk that came goes on from there.
        answered = at + delay
        if len(executed) < len(prefix) and answered < 100 and answered not in asked_at:
            np.testing.assert_array_equal(actions[answered], prefix[len(executed)])
    assert sent or latency <= jitter or len(executor.delays) < 3


@pytest.mark.parametrize("soft", [True, False])
def test_what_follows_the_prefix_travels_as_a_guide(soft: bool) -> None:
    policy = Continuing(4, HORIZON)
    executor = RealTimeChunkingExecutor(LatencyInjected(policy, 100, in_steps=True), 4, soft=soft)
    run(executor, 14)
    first, second, third = policy.asked[:3]
    assert first.action_prefix is first.action_guide is None
    # The first answer took two steps, and with it in hand six actions are left after four.
    in_hand = policy.chunk(0)
    np.testing.assert_array_equal(second.action_prefix, in_hand[4:6])
    if soft:
        np.testing.assert_array_equal(second.action_guide, in_hand[6:])
        assert len(third.action_prefix) == 2 and len(third.action_guide) == 4
    else:
        assert second.action_guide is third.action_guide is None


def test_a_chunk_that_comes_after_its_prefix_ended_is_named() -> None:
    class Later(LatencyInjected):
        delays = iter([1, 1, 4, *[1] * 100])

        def delay_steps(self) -> int:
            return next(self.delays)

    policy = Continuing(0, HORIZON)
    executor = RealTimeChunkingExecutor(Later(policy, 0, in_steps=True), 5)
    run(executor, 30)
    events = [event for event in executor.guard.events if event.name == "late_chunk"]
    assert len(events) == 1 and "4 actions were executed, 1 were committed" in events[0].detail
    assert executor.expected_delay == 4


def test_a_policy_without_prefixes_is_refused_by_name() -> None:
    policy = Counter()
    policy.metadata = {"sampling": {"supports_prefix": False}}  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="takes no prefix"):
        RealTimeChunkingExecutor(policy, 5)


Make = Callable[..., Any]


@pytest.mark.parametrize(
    "make,arguments,field",
    [
        (RecedingHorizonExecutor, {"replan_steps": 11}, "replan_steps"),
        (TemporalEnsemblingExecutor, {"replan_steps": 0}, "replan_steps"),
        (TemporalEnsemblingExecutor, {"decay": -1}, "decay"),
        (AsynchronousExecutor, {"replan_steps": 8, "ask_when_left": 10}, "ask_when_left"),
        (LatencyInjected, {"milliseconds": -1}, "milliseconds"),
        (LatencyInjected, {"milliseconds": 1, "jitter": float("nan")}, "jitter"),
    ],
)
def test_arguments_out_of_range_are_named(make: Make, arguments: Any, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make(Counter(), **arguments)
    assert raised.value.field == field
