"""The regression of action chunks: every knob of the document does what it says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reflexarc.policy.interface import Tensors
from reflexarc.training.objective import Batch
from reflexarc.training.objectives.action_chunk import ActionChunkObjective
from reflexarc.training.objectives.action_chunk_config import ActionChunkConfig
from reflexarc.training.shares import without_loss

HORIZON, ROWS, CHANNELS = 12, 6, 1408
PLAIN: dict[str, Any] = {
    "start_weight": 1.0, "transition_weight": 1.0, "noise_std": 0.0, "state_noise": 0.0,
    "gripper_oversample": 1.0,
}  # fmt: skip


class Predicts:
    """Stands where a policy stands, says what it is told, and keeps the streams that it saw."""

    def __init__(self, predicted: Tensor) -> None:
        self.predicted = predicted
        self.seen: Tensors = {}

    def streams(self, task: Tensors, window: Tensors) -> Tensors:
        tokens = torch.nn.functional.normalize(window["clip"][:, -1], dim=-1)
        return {"video": tokens, "state": window["state"], "goal": task["goal"]}

    def encode_streams(self, streams: Tensors) -> Tensors:
        self.seen = streams
        return streams

    def predict(self, context: Tensors) -> Tensor:
        return self.predicted


def make(**changes: Any) -> ActionChunkObjective:
    classifies = changes.pop("classifies", True)
    config = ActionChunkConfig(**{**PLAIN, **changes})
    return ActionChunkObjective(config, horizon=HORIZON, gripper_index=6, classifies=classifies)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(ROWS, HORIZON, 7, generator=generator)
    actions[..., 6] = -1.0
    actions[:, 5:, 6] = 1.0  # the command changes at step 5
    mask = torch.ones(ROWS, HORIZON, dtype=torch.bool)
    mask[-1, 8:] = False
    return Batch(
        window={
            "clip": torch.randn(ROWS, 1, 1, 4, CHANNELS, generator=generator),
            "static": torch.randn(ROWS, 1, 1, 4, CHANNELS, generator=generator),
            "state": torch.randn(ROWS, 3, 15, generator=generator),
        },
        task={"goal": torch.randn(ROWS, 4, CHANNELS, generator=generator)},
        valid=torch.ones(ROWS, 4, dtype=torch.bool),
        actions=actions,
        action_mask=mask,
    )


def losses(objective: ActionChunkObjective, batch: Batch, predicted: Tensor) -> dict[str, float]:
    draws = objective.draw(batch, torch.Generator().manual_seed(1))
    found = objective(Predicts(predicted), batch, draws)
    return {name: float(value) for name, value in found.items()}


def perfect(batch: Batch) -> Tensor:
    predicted = batch.actions.clone()
    predicted[..., 6] *= 20  # a sure logit
    return predicted


def test_what_was_demonstrated_costs_nothing(batch: Batch) -> None:
    for changes in ({}, {"regression": "mse"}, {"regression": "smooth_l1"}, {"classifies": False}):
        found = losses(make(**changes), batch, perfect(batch))
        assert found["total"] == pytest.approx(0.0, abs=1e-6)


def test_an_error_costs_its_size(batch: Batch) -> None:
    off = perfect(batch)
    off[..., :6] += 0.5
    assert losses(make(), batch, off)["motion"] == pytest.approx(0.5, rel=1e-5)
    assert losses(make(regression="mse"), batch, off)["motion"] == pytest.approx(0.25, rel=1e-5)
    smooth = losses(make(regression="smooth_l1"), batch, off)["motion"]
    assert smooth == pytest.approx(0.5 - 0.05, rel=1e-5)


def test_the_total_is_a_mean_over_dimensions_with_the_gripper_weighted(batch: Batch) -> None:
    off = perfect(batch) + 0.3
    found = losses(make(gripper_loss_weight=2.0), batch, off)
    expected = (6 * found["motion"] + 2 * found["gripper"]) / 7
    assert found["total"] == pytest.approx(expected, rel=1e-6)


def test_the_gripper_is_classified_or_regressed(batch: Batch) -> None:
    zeros = torch.zeros_like(batch.actions)
    assert losses(make(), batch, zeros)["gripper"] == pytest.approx(np.log(2), rel=1e-5)
    assert losses(make(classifies=False), batch, zeros)["gripper"] == pytest.approx(1.0)
    # Closing is the positive class, and +1 closes.
    closes = zeros.clone()
    closes[..., 6] = 30.0
    steps = batch.action_mask.sum()
    opened = int(((batch.actions[..., 6] < 0) & batch.action_mask).sum())
    assert losses(make(), batch, closes)["gripper"] == pytest.approx(30 * opened / float(steps))


def test_padding_costs_nothing_unless_it_is_asked_for(batch: Batch) -> None:
    off = perfect(batch)
    off[-1, 8:, :6] += 5.0
    assert losses(make(), batch, off)["motion"] == pytest.approx(0.0, abs=1e-6)
    unmasked = losses(make(mask_padding=False), batch, off)
    assert unmasked["motion"] == pytest.approx(5.0 * 4 / (ROWS * HORIZON), rel=1e-5)


def test_step_weights_are_those_of_the_document(batch: Batch) -> None:
    objective = make(start_weight=3.0, start_steps=4, transition_weight=5.0, transition_margin=1)
    weights = objective.step_weights(batch)
    expected = torch.ones(HORIZON)
    expected[:4] = 3.0
    expected[4:7] *= 5.0
    assert torch.equal(weights[0], expected)
    assert torch.equal(weights[-1, 8:], torch.zeros(4))
    assert objective.weight(batch) == pytest.approx(float(weights.sum()))
    narrow = make(transition_weight=5.0, transition_margin=0).step_weights(batch)
    assert (narrow[0] == 5).nonzero().flatten().tolist() == [5]


def test_a_wrong_first_step_costs_start_weight_times_as_much(batch: Batch) -> None:
    objective = make(start_weight=3.0, start_steps=2)
    early, late = perfect(batch), perfect(batch)
    early[:, 0, :6] += 1.0
    late[:, 3, :6] += 1.0
    ratio = losses(objective, batch, early)["motion"] / losses(objective, batch, late)["motion"]
    assert ratio == pytest.approx(3.0, rel=1e-4)


def test_rows_that_stand_in_for_others_never_count(batch: Batch) -> None:
    for changes in ({}, {"mask_padding": False}):
        objective = make(**changes)
        nothing = without_loss(batch)
        assert objective.weight(nothing) == 0
        assert losses(objective, nothing, perfect(batch) + 1)["total"] == 0


def test_parts_of_a_batch_add_up_to_the_whole(batch: Batch) -> None:
    """As passes of one step do, each weighted by ``weight``."""
    objective = make(start_weight=3.0, transition_weight=5.0)
    off = perfect(batch) + torch.randn(batch.actions.shape, generator=torch.Generator())
    sums, total = 0.0, 0.0
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5])):
        part = Batch(
            window={name: values[rows] for name, values in batch.window.items()},
            task={name: values[rows] for name, values in batch.task.items()},
            valid=batch.valid[rows],
            actions=batch.actions[rows],
            action_mask=batch.action_mask[rows],
        )
        weight = objective.weight(part)
        sums += weight * losses(objective, part, off[rows])["total"]
        total += weight
    assert sums / total == pytest.approx(losses(objective, batch, off)["total"], rel=1e-5)


def seen(objective: ActionChunkObjective, batch: Batch, *, training: bool) -> Tensors:
    policy = Predicts(perfect(batch))
    objective.train(training)
    objective(policy, batch, objective.draw(batch, torch.Generator().manual_seed(1)))
    return policy.seen


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=-1).mean())


def test_noise_is_as_long_as_it_says_and_the_documents_drowns_the_signal(batch: Batch) -> None:
    clean = seen(make(), batch, training=True)
    noisy = seen(make(noise_std=0.05), batch, training=True)
    length = (noisy["video"] - clean["video"]).norm(dim=-1)
    torch.testing.assert_close(length, torch.full_like(length, 0.05), rtol=0.1, atol=0)
    assert cosine(noisy["video"], clean["video"]) > 0.998
    # The same share of the length where tokens are not of unit length.
    share = (noisy["goal"] - clean["goal"]).norm(dim=-1) / clean["goal"].norm(dim=-1)
    torch.testing.assert_close(share, torch.full_like(share, 0.05), rtol=0.1, atol=0)
    drowned = seen(make(noise_std=0.05, noise_scaling="element"), batch, training=True)
    assert cosine(drowned["video"], clean["video"]) == pytest.approx(0.47, abs=0.01)


def test_validation_sees_neither_noise_nor_stills(batch: Batch) -> None:
    objective = make(noise_std=0.05, state_noise=0.1, static_aug=1.0)
    clean = seen(make(), batch, training=False)
    for name, stream in seen(objective, batch, training=False).items():
        assert torch.equal(stream, clean[name])
    assert not torch.equal(seen(objective, batch, training=True)["state"], clean["state"])


def test_static_aug_shows_the_newest_frame_held_still(batch: Batch) -> None:
    still = replace(batch, window={**batch.window, "clip": batch.window["static"]})
    always = seen(make(static_aug=1.0), batch, training=True)
    assert torch.equal(always["video"], seen(make(), still, training=True)["video"])
    half = seen(make(static_aug=0.5), batch, training=True)["video"]
    held = (half == always["video"]).flatten(1).all(1)
    assert 0 < int(held.sum()) < ROWS


def test_draws_depend_on_nothing_but_the_generator(batch: Batch) -> None:
    objective = make(noise_std=0.05, state_noise=0.1, static_aug=0.5)
    one, two = (objective.draw(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.keys() == {"video_noise", "goal_noise", "state_noise", "static"}
    assert all(torch.equal(one[name], two[name]) and len(one[name]) == ROWS for name in one)


@dataclass
class Recorded:
    """An episode as far as its samples' weights ask."""

    commands: list[int]
    stride: int = 1

    @property
    def length(self) -> int:
        return len(self.commands)

    @property
    def image_steps(self) -> np.ndarray:
        return np.arange(0, self.length, self.stride)

    def labelled_actions(self, labels: str) -> np.ndarray:
        actions = np.zeros((self.length, 7))
        actions[:, 6] = self.commands
        return actions


def weights_of(episode: Recorded, **changes: Any) -> np.ndarray | None:
    return make(**changes).frame_weights(episode, "executed")  # type: ignore[arg-type]


def test_changes_of_the_gripper_are_seen_more_often(batch: Batch) -> None:
    episode = Recorded([-1] * 20 + [1] * 20)
    assert weights_of(episode) is None
    exact = weights_of(episode, gripper_oversample=5.0, gripper_jitter=0)
    assert exact is not None
    assert exact[20] == 5.0
    assert np.delete(exact, 20) == pytest.approx(1.0)
    spread = weights_of(episode, gripper_oversample=5.0, gripper_jitter=5)
    assert spread is not None
    assert spread.sum() == pytest.approx(40 + 4)  # as many sights, some steps earlier or later
    assert spread[15:26] == pytest.approx(1 + 4 / 11)
    assert spread[[14, 26]] == pytest.approx(1.0)
    rare = weights_of(Recorded([-1] * 22 + [1] * 18, 4), gripper_oversample=5.0, gripper_jitter=1)
    assert rare is not None
    assert rare.argmax() == 5  # step 20, the last image before the change
    assert rare.sum() == pytest.approx(10 + 4)


def test_steps_near_the_end_are_observations_unless_they_are_left_out() -> None:
    episode = Recorded([-1] * 40)
    assert weights_of(episode) is None
    whole = weights_of(episode, every_step=False)
    assert whole is not None
    assert whole.tolist() == [1.0] * (40 - HORIZON + 1) + [0.0] * (HORIZON - 1)
