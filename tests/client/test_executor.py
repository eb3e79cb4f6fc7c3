"""RecedingHorizonExecutor: which actions, when it asks, and when it looks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from reflexarc.client import PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import ActionChunk, Observation
from reflexarc.contract.errors import ConfigError
from reflexarc.server import BackgroundServer, NullPolicy, libero_contract

MakeObservation = Callable[..., Observation]


class CountingPolicy:
    """Row ``r`` of its n-th chunk holds ``100 n + r``."""

    def __init__(self) -> None:
        contract = libero_contract(horizon=10)
        wide = {"low": (-999.0,) * 7, "high": (999.0,) * 7}
        action = contract.action.model_copy(update=wide)
        self.contract = contract.model_copy(update={"action": action})
        self.seen: list[Observation] = []

    def infer(self, observation: Observation) -> ActionChunk:
        rows = 100 * len(self.seen) + np.arange(10, dtype=np.float32)
        self.seen.append(observation)
        return ActionChunk(actions=np.tile(rows[:, None], (1, 7)), seed=0)


def test_executes_the_first_steps_of_each_chunk_and_looks_only_then(
    observe: MakeObservation,
) -> None:
    policy, looks = CountingPolicy(), []
    executor = RecedingHorizonExecutor(policy, replan_steps=3)

    def look() -> Observation:
        looks.append(len(looks))
        return observe()

    actions = [executor.next_action(look) for _ in range(8)]
    assert [float(action[0]) for action in actions] == [0, 1, 2, 100, 101, 102, 200, 201]
    assert all(action.shape == (7,) and action.dtype == np.float32 for action in actions)
    assert len(looks) == executor.chunks == len(executor.latencies_ms) == 3
    assert [observation.step_index for observation in policy.seen] == [0, 3, 6]


def test_reset_forgets_the_chunk_in_hand(observe: MakeObservation) -> None:
    policy = CountingPolicy()
    executor = RecedingHorizonExecutor(policy, replan_steps=10)
    executor.next_action(observe)
    executor.reset()
    assert executor.chunks == 0
    assert executor.next_action(observe)[0] == 100
    assert policy.seen[1].step_index == 0


def test_changing_an_action_changes_no_other(observe: MakeObservation) -> None:
    executor = RecedingHorizonExecutor(CountingPolicy(), replan_steps=2)
    executor.next_action(observe)[:] = -1
    assert executor.next_action(observe)[0] == 1


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_replan_steps_outside_the_horizon_are_named(steps: int) -> None:
    with pytest.raises(ConfigError, match="horizon 10") as raised:
        RecedingHorizonExecutor(CountingPolicy(), replan_steps=steps)
    assert raised.value.field == "replan_steps"


def test_with_a_served_policy(policy_server: BackgroundServer, observe: MakeObservation) -> None:
    with PolicyClient(policy_server.url) as client:
        executor = RecedingHorizonExecutor(client, replan_steps=10)
        actions = [executor.next_action(lambda: observe(seed=4)) for _ in range(10)]
    expected = NullPolicy().infer([observe(seed=4)])[0].actions
    np.testing.assert_array_equal(np.stack(actions), expected)
