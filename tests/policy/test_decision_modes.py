"""Decisions at prepared shapes are those that are computed eagerly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reflexarc.contract import Observation
from reflexarc.contract.errors import ConfigError
from reflexarc.policy import threads
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.decisions import EagerDecisions, check_mode, make_decisions
from reflexarc.policy.fixed_shapes import FixedShapeDecisions, Function
from reflexarc.policy.interface import Tensors
from reflexarc.policy.runtime import PolicyRuntime
from reflexarc.policy.statevla.model import StateVLA


def held_buffers(function: Function, inputs: Tensors) -> Function:
    """What a graph does to memory, on any device: inputs and outputs have one place each."""
    held = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = {name: tensor.clone() for name, tensor in function(held).items()}

    def replay(given: Tensors) -> Tensors:
        for name, tensor in held.items():
            assert tensor.shape == given[name].shape
            tensor.copy_(given[name])
        for name, tensor in function(held).items():
            outputs[name].copy_(tensor)
        return {name: tensor.clone() for name, tensor in outputs.items()}

    return replay


def arguments(rows: int, seed: int = 0) -> tuple[Tensors, Tensors, Tensor]:
    """``task``, ``window`` and ``valid`` of the tiny policy."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    window = {"vision": draw(1, 2, 4, 8), "state": draw(1, 8)}
    return {"language": draw(16)}, window, torch.ones(rows, 1, dtype=torch.bool)


@torch.inference_mode()
def test_prepared_shapes_give_the_actions_of_each_row(policy: StateVLA) -> None:
    prepared: list[tuple[int, ...]] = []

    def counting(function: Function, inputs: Tensors) -> Function:
        prepared.append(tuple(next(iter(inputs.values())).shape))
        return held_buffers(function, inputs)

    fixed, eager = FixedShapeDecisions(policy, counting), EagerDecisions(policy)
    for seed, (rows, steps, prefix) in enumerate(
        [(1, 4, 0), (3, 4, 0), (4, 4, 0), (3, 4, 0), (3, 2, 0), (2, 4, 2), (1, 4, 0)]
    ):
        given = {"noise": torch.randn(rows, 5, 6)}
        if prefix:
            given["prefix"] = torch.randn(rows, prefix, 7)
        one = fixed.sample(*arguments(rows, seed), steps, given)
        two = eager.sample(*arguments(rows, seed), steps, given)
        assert one.shape == (rows, 5, 7)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert [shape[0] for shape in prepared] == [1, 4, 4, 2]  # 3 rows are 4 with one repeated


@torch.inference_mode()
def test_frames_are_embedded_and_a_guide_is_followed(policy: StateVLA) -> None:
    fixed, eager = FixedShapeDecisions(policy, held_buffers), EagerDecisions(policy)
    frames = {
        name: torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
        for name in policy.contract.camera_names
    }
    task, _, _ = arguments(3)
    one, two = fixed.embed_frames(frames, task), eager.embed_frames(frames, task)
    torch.testing.assert_close(one["vision"], two["vision"], rtol=0, atol=1e-6)
    given = {"noise": torch.randn(3, 5, 6), "guide": torch.randn(3, 2, 7)}
    actions = [d.sample(*arguments(3), 4, given) for d in (fixed, eager)]
    assert torch.equal(*actions)


def raises(function: Function, inputs: Tensors) -> Function:
    raise RuntimeError("operation not permitted when stream is capturing")


def another(function: Function, inputs: Tensors) -> Function:
    return lambda given: {name: tensor + 1 for name, tensor in function(given).items()}


@pytest.mark.parametrize(
    ("capture", "said"), [(raises, "not permitted"), (another, "its results differ by")]
)
@torch.inference_mode()
def test_what_cannot_be_captured_runs_eagerly_and_is_said_once(
    policy: StateVLA,
    capture: Callable[[Function, Tensors], Function],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fixed, eager = FixedShapeDecisions(policy, capture), EagerDecisions(policy)
    with caplog.at_level(logging.WARNING):
        for rows in (3, 1):
            given = {"noise": torch.randn(rows, 5, 6)}
            chunks = [d.sample(*arguments(rows), 4, given) for d in (fixed, eager)]
            assert torch.equal(*chunks)
    assert [said in record.message for record in caplog.records] == [True]


def test_modes_that_a_device_has_not_are_refused(saved: Path, policy: StateVLA) -> None:
    assert isinstance(make_decisions(policy), EagerDecisions)  # auto, on a CPU
    assert check_mode("graph", "cuda:1") == "graph"
    with pytest.raises(ConfigError, match="--compile graph needs a CUDA device"):
        PolicyRuntime(load_checkpoint(saved, "cpu"), compile_mode="graph")
    with pytest.raises(ConfigError, match="must be one of auto, off, graph, got 'fast'"):
        check_mode("fast", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graphs_on_cuda_give_what_is_computed_eagerly(
    saved: Path, observe: Callable[..., Observation], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_checkpoint(saved, "cuda")
    graphed, eager = (PolicyRuntime(loaded, compile_mode=mode) for mode in ("graph", "off"))
    with caplog.at_level(logging.WARNING):
        for rows in (1, 3, 4, 3):
            observations = [observe(number) for number in range(rows)]
            chunks = [runtime.infer(observations) for runtime in (graphed, eager)]
            for one, two in zip(*chunks, strict=True):
                np.testing.assert_allclose(one.actions, two.actions, rtol=0, atol=1e-5)
            again = graphed.infer(observations)
            for one, two in zip(chunks[0], again, strict=True):
                np.testing.assert_array_equal(one.actions, two.actions)
    assert not caplog.records


def test_threads_are_those_that_were_asked_for_or_that_the_container_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    try:
        assert threads.use_threads(3) == torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert threads.use_threads() == torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(64)))
        quota = tmp_path / "cpu.max"
        monkeypatch.setattr(threads, "_QUOTA", quota)
        for text, cores in (("150000 100000", 2), ("max 100000", 64), ("9900000 100000", 64)):
            quota.write_text(text)
            assert threads.usable_cores() == cores
        assert threads.use_threads() == 64
    finally:
        torch.set_num_threads(before)
