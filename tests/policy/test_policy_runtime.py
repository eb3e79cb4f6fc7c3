"""Train, save, load, infer: the same chunks as the policy called in process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reflexarc.contract import ActionChunk, NormalizationStatistics, Observation
from reflexarc.contract.errors import (
    ContractViolationError,
    InferenceError,
    UnknownInstructionError,
)
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.interface import Task
from reflexarc.policy.processing import Processor
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.policy.statevla.model import StateVLA

Observe = Callable[..., Observation]


@pytest.fixture
def runtime(saved: Path) -> PolicyRuntime:
    return PolicyRuntime(load_checkpoint(saved))


def train_a_little(policy: StateVLA) -> None:
    """A few optimiser steps on random data, so that weights are no longer the initial ones."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    policy.train()
    for _ in range(3):
        context = policy.encode(
            {"language": draw(4, 16)},
            {"vision": draw(4, 1, 2, 4, 8), "state": draw(4, 1, 8)},
            torch.ones(4, 1, dtype=torch.bool),
        )
        velocity = policy.velocity(context, draw(4, 5, 6), torch.rand(4, generator=generator))
        loss = velocity.square().mean() + policy.gripper_logits(context).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()


@torch.no_grad()
def chunks_in_process(
    policy: StateVLA, statistics: NormalizationStatistics, observations: list[Observation]
) -> np.ndarray:
    processor = Processor(policy.contract, statistics)
    task = policy.embed_task([Task(instruction=o.instruction) for o in observations])
    frames = processor.frames(
        {
            name: np.stack([o.images[name] for o in observations])
            for name in policy.contract.camera_names
        }
    )
    window = {name: rows[:, None] for name, rows in policy.embed_frames(frames, task).items()}
    states = np.stack([o.state for o in observations])
    window["state"] = processor.normalize_state(states)[:, None]
    context = policy.encode(task, window, torch.ones(len(states), 1, dtype=torch.bool))
    noise = torch.stack(
        [torch.randn(5, 6, generator=torch.Generator().manual_seed(o.seed)) for o in observations]  # type: ignore[arg-type]
    )
    return processor.actions_to_robot(policy.sample_actions(context, noise, steps=4))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_saved_policy_answers_as_it_did_in_process(
    tmp_path: Path,
    policy: StateVLA,
    statistics: NormalizationStatistics,
    observe: Observe,
    rows: int,
) -> None:
    train_a_little(policy)
    observations = [observe(number) for number in range(rows)]
    wanted = chunks_in_process(policy, statistics, observations)
    saved = save_checkpoint(tmp_path / "trained", policy, statistics, {})
    chunks = PolicyRuntime(load_checkpoint(saved)).infer(observations)
    assert len(chunks) == rows
    for chunk, actions in zip(chunks, wanted, strict=True):
        assert chunk.actions.dtype == np.float32
        np.testing.assert_array_equal(chunk.actions, actions)


def test_a_chunk_is_executable_and_carries_what_was_sent(
    runtime: PolicyRuntime, observe: Observe
) -> None:
    (chunk,) = runtime.infer([observe(7, request_id="r", session_id="s")])
    action = runtime.contract.action
    assert chunk.actions.shape == (action.horizon, action.dimension)
    assert (chunk.actions >= action.low).all()
    assert (chunk.actions <= action.high).all()
    assert set(chunk.actions[:, 6].tolist()) <= {-1.0, 1.0}
    assert (chunk.seed, chunk.request_id, chunk.session_id) == (7, "r", "s")
    assert set(chunk.timing) == {"preprocess_ms", "device_ms", "postprocess_ms"}
    assert all(milliseconds >= 0 for milliseconds in chunk.timing.values())


def test_a_drawn_seed_is_told_and_gives_the_chunk_again(
    runtime: PolicyRuntime, observe: Observe
) -> None:
    (first,) = runtime.infer([observe(1, seed=None)])
    (second,) = runtime.infer([observe(1, seed=None)])
    assert first.seed != second.seed
    assert (first.actions != second.actions).any()
    (again,) = runtime.infer([observe(1, seed=first.seed)])
    np.testing.assert_array_equal(again.actions, first.actions)


def test_rows_do_not_depend_on_their_batch(runtime: PolicyRuntime, observe: Observe) -> None:
    butter = observe(2, instruction="pick up the butter")
    together = runtime.infer([observe(1), butter])
    others = runtime.infer([observe(3, instruction="pick up the butter"), butter])
    np.testing.assert_array_equal(others[1].actions, together[1].actions)
    # Alone or elsewhere in the batch, threads share out the work in another way.
    (alone,) = runtime.infer([butter])
    swapped = runtime.infer([butter, observe(1)])
    for chunk in (alone, swapped[0]):
        np.testing.assert_allclose(chunk.actions, together[1].actions, atol=1e-5)


def test_rows_with_other_denoising_steps_keep_their_places(saved: Path, observe: Observe) -> None:
    runtime = PolicyRuntime(load_checkpoint(saved))
    mixed = runtime.infer(
        [observe(1), observe(2, denoising_steps=1), observe(3), observe(4, denoising_steps=1)]
    )
    usual = runtime.infer([observe(1), observe(3)])
    one_step = runtime.infer([observe(2, denoising_steps=1), observe(4, denoising_steps=1)])
    for chunk, expected in zip(mixed, (usual[0], one_step[0], usual[1], one_step[1]), strict=True):
        np.testing.assert_array_equal(chunk.actions, expected.actions)
    # The server's own number of steps stands in for a request that names none.
    with_one = PolicyRuntime(load_checkpoint(saved), denoising_steps=1)
    assert (runtime.default_steps, with_one.default_steps) == (4, 1)
    for chunk, expected in zip(with_one.infer([observe(2), observe(4)]), one_step, strict=True):
        np.testing.assert_array_equal(chunk.actions, expected.actions)


def test_an_instruction_is_embedded_once(
    runtime: PolicyRuntime, observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    embed_task = StateVLA.embed_task

    def counting(policy: StateVLA, tasks: list[Task]) -> dict[str, torch.Tensor]:
        seen.extend(task.instruction for task in tasks)
        return embed_task(policy, tasks)

    monkeypatch.setattr(StateVLA, "embed_task", counting)
    for _ in range(3):
        runtime.infer([observe(1), observe(2), observe(3, instruction="pick up the butter")])
    assert seen == ["pick up the milk", "pick up the butter"]


def test_bad_observations_are_refused(runtime: PolicyRuntime, observe: Observe) -> None:
    with pytest.raises(ContractViolationError, match="state"):
        runtime.infer([observe(1), observe(2, state=np.zeros(9))])
    with pytest.raises(UnknownInstructionError, match="pick up the bread"):
        runtime.infer([observe(1), observe(2, instruction="pick up the bread")])
    assert runtime.infer([]) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_actions_that_are_not_finite_are_an_error(
    saved: Path, observe: Observe, value: float
) -> None:
    loaded = load_checkpoint(saved)
    # The bias of the last layer: infinity must not be clipped to a full motion.
    loaded.policy.flow.action_out[-1].bias.fill_(value)  # type: ignore[union-attr, index, operator]
    with pytest.raises(InferenceError, match="not finite"):
        PolicyRuntime(loaded).infer([observe(1)])


SERVE = """
import sys
import numpy as np
from pathlib import Path
from reflexarc.contract import Observation
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.runtime import PolicyRuntime
runtime = PolicyRuntime(load_checkpoint(Path(sys.argv[1])))
images = {name: np.zeros((64, 64, 3), np.uint8) for name in runtime.contract.camera_names}
runtime.infer([Observation(images=images, state=np.zeros(8), instruction="pick up the milk")])
print([name for name in ("transformers", "torchvision", "h5py", "mujoco") if name in sys.modules])
"""


def test_serving_imports_neither_transformers_nor_data_nor_simulator(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(saved)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_parts_come_group_by_group_and_a_wrong_row_harms_no_other(
    runtime: PolicyRuntime, observe: Observe
) -> None:
    rows = [
        observe(0, denoising_steps=2),
        observe(1, instruction="unheard of"),
        observe(2, denoising_steps=3),
        observe(3, denoising_steps=2),
    ]
    parts = list(runtime.infer_in_parts(rows))
    assert [[index for index, _ in part] for part in parts] == [[1], [0, 3], [2]]
    outcomes = {index: outcome for part in parts for index, outcome in part}
    assert isinstance(outcomes[1], UnknownInstructionError)
    for index in (0, 2, 3):
        (alone,) = runtime.infer([rows[index]])
        chunk = outcomes[index]
        assert isinstance(chunk, ActionChunk)
        assert chunk.seed == alone.seed
        np.testing.assert_allclose(chunk.actions, alone.actions, atol=1e-5)
