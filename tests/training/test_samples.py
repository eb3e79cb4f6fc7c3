"""Samples, their windows and futures; splits; batches and their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError, DatasetError
from reflexarc.contract.policy_contract import (
    LIBERO_STATE_JOINT,
    History,
    libero_action,
    libero_cameras,
)
from reflexarc.data.libero_episode import Episode, Labels
from reflexarc.data.libero_hdf5 import LiberoDataset, open_libero
from reflexarc.data.statistics import compute_statistics
from reflexarc.policy.processing import Processor
from reflexarc.policy.windows import pad_window
from reflexarc.training.feature_store import holding
from reflexarc.training.feature_store.holding import hold_features
from reflexarc.training.samples import (
    BatchOrder,
    BatchSource,
    SampleTable,
    build_samples,
    split_episodes,
)
from reflexarc.training.time_windows import chunk_actions


def test_a_chunk_past_the_end_holds_zero_deltas_and_the_last_gripper_command() -> None:
    actions = np.arange(5 * 7, dtype=np.float64).reshape(5, 7)
    actions[:, 6] = [-1, -1, 1, 1, 1]
    chunks, mask = chunk_actions(actions, np.array([0, 3]), 4, libero_action(4))
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


def contract_with(history: History, horizon: int = 3) -> PolicyContract:
    return PolicyContract(
        family="statevla",
        cameras=libero_cameras(32, 32),
        state=LIBERO_STATE_JOINT,
        history=history,
        action=libero_action(horizon),
    )


def samples_of(
    path: Path,
    history: History | None = None,
    *,
    labels: Labels = "executed",
    ahead: int | None = None,
) -> tuple[SampleTable, Episode, Processor]:
    episode = open_libero([path]).episodes[0]
    statistics = compute_statistics(
        LiberoDataset([episode]), LIBERO_STATE_JOINT.layout, labels=labels
    )
    processor = Processor(contract_with(history or History()), statistics)
    samples = build_samples(
        [episode], [100], {episode.instruction: 0}, processor, labels=labels, ahead=ahead
    )
    return samples, episode, processor


def test_a_window_holds_past_rows_and_marks_padding(
    task_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = task_file(tmp_path / "one_demo.hdf5", demos=1, steps=21, stride=4)
    history = History(frames=3, states=2, stride=8)
    samples, episode, processor = samples_of(path, history)
    # Images at 0, 4, 8, 12, 16, 20 are the rows 100 ... 105.
    assert samples.frame_row.tolist() == [
        [100, 100, 100], [101, 101, 101], [100, 100, 102],
        [101, 101, 103], [100, 102, 104], [101, 103, 105],
    ]  # fmt: skip
    assert samples.valid.tolist() == [
        [False, False, True], [False, False, True], [False, True, True],
        [False, True, True], [True, True, True], [True, True, True],
    ]  # fmt: skip
    states = processor.normalize_state(episode.states(LIBERO_STATE_JOINT.layout))
    assert torch.equal(samples.state[4], states[[8, 16]])
    assert torch.equal(samples.state[1], states[[4, 4]])

    # What serving makes of the same rows is the same window.
    names = {step: torch.tensor([row]) for row, step in enumerate(episode.image_steps, start=100)}
    for sample, step in enumerate(episode.image_steps.tolist()):
        frames = {s: {"row": names[s]} for s in history.frame_steps(step)}
        seen = {s: states[s] for s in history.state_steps(step)}
        window, valid = pad_window(history, [step], [frames], [seen])
        assert torch.equal(window["row"][0, :, 0], samples.frame_row[sample])
        assert torch.equal(window["state"][0], samples.state[sample])
        assert torch.equal(valid[0], samples.valid[sample])


def test_the_future_is_the_window_k_steps_later_and_masked_past_the_end(
    task_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = task_file(tmp_path / "one_demo.hdf5", demos=1, steps=21, stride=4)
    samples, episode, processor = samples_of(path, History(frames=2, stride=4), ahead=8)
    future = samples.future
    assert future is not None
    assert future.exists.tolist() == [True, True, True, True, False, False]
    assert future.frame_row.tolist() == [
        [101, 102], [102, 103], [103, 104], [104, 105], [104, 105], [104, 105]
    ]  # fmt: skip
    assert future.actions.shape == (6, 8, 7)
    actions = processor.normalize_actions(episode.actions())
    assert torch.equal(future.actions[2], actions[8:16])
    states = processor.normalize_state(episode.states(LIBERO_STATE_JOINT.layout))
    assert torch.equal(future.state[1, -1], states[12])


def test_a_horizon_without_images_names_those_that_the_data_offers(
    task_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = task_file(tmp_path / "one_demo.hdf5", demos=1, steps=21, stride=4)
    with pytest.raises(ConfigError, match=r"horizon is 3.*4 steps apart.*offers: 4, 8, 12, 16, 20"):
        samples_of(path, ahead=3)
    with pytest.raises(ConfigError, match="none of 1 episodes is that long"):
        samples_of(path, ahead=24)
    with pytest.raises(ConfigError, match=r"contract\.history\.stride must be a multiple of 4"):
        samples_of(path, History(frames=2, stride=3))


def test_expert_labels_train_the_chunks_and_what_was_executed_makes_the_future(
    task_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = task_file(tmp_path / "one_demo.hdf5", demos=1, steps=21, stride=4)
    with pytest.raises(DatasetError, match=r"collect it again.*data\.labels: executed"):
        samples_of(path, labels="expert")
    with h5py.File(path, "r+") as file:
        demo = file["data/demo_0"]
        expert = demo["actions"][:] * 0.5
        expert[:, 6] = demo["actions"][:, 6]
        demo["expert_actions"] = expert
    samples, episode, processor = samples_of(path, labels="expert", ahead=4)
    assert np.allclose(processor.statistics.action.std[:6], expert[:, :6].std(0))
    assert torch.equal(samples.actions[1], processor.normalize_actions(expert[4:7]))
    assert samples.future is not None
    executed = processor.normalize_actions(episode.actions()[4:8])
    assert torch.equal(samples.future.actions[1], executed)


@pytest.mark.parametrize("held", [True, False])
def test_a_batch_gathers_features_of_the_window_and_the_future(
    task_file: Callable[..., Path], tmp_path: Path, held: bool
) -> None:
    path = task_file(tmp_path / "one_demo.hdf5", demos=1, steps=21, stride=4)
    samples, _, _ = samples_of(path, History(frames=2, stride=4), ahead=4)
    np.save(tmp_path / "vision.npy", np.arange(120, dtype=np.float16)[:, None] * np.ones((1, 3)))
    np.save(tmp_path / "pixels.npy", np.arange(120, dtype=np.uint8).reshape(120, 1))
    arrays = {
        name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("vision", "pixels")
    }
    arrays["vision"] = arrays["vision"].astype(np.float16)
    features = hold_features(arrays, torch.device("cpu")).rows if held else arrays
    task = {"language": torch.tensor([[7.0]])}
    batch = BatchSource(samples, features, task).batch(torch.tensor([2, 0]))
    assert batch.window["vision"].dtype == torch.float32
    assert batch.window["vision"][..., 0].tolist() == [[101, 102], [100, 100]]
    assert batch.window["pixels"].dtype == torch.uint8
    assert batch.future is not None and batch.future_valid is not None
    assert batch.future["vision"][..., 0].tolist() == [[102, 103], [100, 101]]
    assert batch.future_valid.tolist() == [[True, True], [True, True]]
    assert batch.task["language"].tolist() == [[7.0], [7.0]]
    assert batch.window["state"].shape == (2, 1, 9)


def test_features_that_would_fill_the_memory_stay_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"vision": np.zeros((10, 4), np.float16)}
    for free, place in ((81 * 4, "in memory"), (80 * 4, "on disk, memory-mapped")):
        monkeypatch.setattr(holding, "free_memory", lambda free=free: free)
        assert hold_features(arrays, torch.device("cpu")).place == place
