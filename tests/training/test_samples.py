"""Chunks, splits and the order of batches."""

from __future__ import annotations

import numpy as np
import torch

from reflexarc.training.samples import BatchOrder, chunk_actions, split_episodes


def test_a_chunk_past_the_end_holds_zero_deltas_and_the_last_gripper_command() -> None:
    actions = np.arange(5 * 7, dtype=np.float64).reshape(5, 7)
    actions[:, 6] = [-1, -1, 1, 1, 1]
    chunks, mask = chunk_actions(actions, np.array([0, 3]), horizon=4, gripper=6)
    assert chunks.shape == (2, 4, 7)
    np.testing.assert_array_equal(chunks[0], actions[:4])
    np.testing.assert_array_equal(chunks[1, :2], actions[3:])
    np.testing.assert_array_equal(chunks[1, 2:, :6], 0)
    np.testing.assert_array_equal(chunks[1, 2:, 6], 1)
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_the_split_is_by_episode_stratified_and_stable() -> None:
    names = ["a"] * 10 + ["b"] * 10
    train, held_out = split_episodes(names, 0.2, seed=3)
    assert sorted(train + held_out) == list(range(20))
    assert [sum(names[i] == task for i in held_out) for task in "ab"] == [2, 2]
    assert split_episodes(names, 0.2, seed=3) == (train, held_out)
    assert split_episodes(names, 0.2, seed=4) != (train, held_out)
    # A further task moves no other task's split.
    _, with_third = split_episodes([*names, *"ccccc"], 0.2, seed=3)
    assert [i for i in with_third if i < 20] == held_out


def test_a_lone_episode_is_trained_on_and_no_fraction_holds_out_nothing() -> None:
    assert split_episodes(["a"], 0.5, seed=0) == ([0], [])
    assert split_episodes(["a", "a"], 0.9, seed=0)[0] != []
    assert split_episodes(["a", "a", "a"], 0.0, seed=0) == ([0, 1, 2], [])


def test_every_epoch_sees_every_sample_once_in_another_order() -> None:
    order = BatchOrder(samples=10, batch_size=4, seed=0)
    assert order.steps_per_epoch == 3
    epochs = [torch.cat([order.indices(3 * epoch + i) for i in range(3)]) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert epochs[0].tolist() != epochs[1].tolist()
    # A pure function of the step: asking for step 4 first gives the same batch.
    again = BatchOrder(samples=10, batch_size=4, seed=0)
    assert torch.equal(again.indices(4), order.indices(4))
