"""Passes, precision, recomputed activations, reading ahead, what is logged, a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import Recipe
from reflexarc.training.config_objectives import FlowMatchingConfig
from reflexarc.training.distributed.launch import join_processes
from reflexarc.training.errors import DiskFullError, TrainingDivergedError
from reflexarc.training.gradient_norms import GradientNorms
from reflexarc.training.loader import BatchLoader
from reflexarc.training.objectives.flow_matching import FlowMatchingObjective
from reflexarc.training.outcome import Outcome
from reflexarc.training.precision import Precision, check_precision
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan
from reflexarc.training.shares import in_size_of, shares_of
from reflexarc.training.trainer import Trainer

from .tiny_statevla import random_source, tiny_statevla
from .train_processes import assert_close_metrics, final_tensors, largest_difference, metrics

CPU = torch.device("cpu")
Run = Callable[..., Path]


@pytest.fixture
def run(demonstrations: Path, tmp_path: Path) -> Run:
    """Train the tiny recipe for 10 steps with some keys changed; returns the run's folder."""

    def train(name: str, *overrides: str, resume: bool = False) -> Path:
        recipe = tiny(demonstrations, *overrides)
        trained(recipe, tmp_path / name, resume=resume)
        return tmp_path / name

    return train


def tiny(data: Path, *overrides: str) -> Recipe:
    values = {"epochs": "null", "steps": 10, "log_every": 3, "checkpoint_every": 4,
              "validate_every": 5, "ema_decay": 0.9}  # fmt: skip
    fixed = [f"training.{name}={value}" for name, value in values.items()]
    return load_recipe("statevla_tiny", [f"data.paths=['{data}']", *fixed, *overrides])


def trained(recipe: Recipe, output: Path, *, resume: bool = False) -> Outcome:
    planned = plan(recipe, output, device=CPU, feature_cache=output.parent / "cache")
    folder = open_run_folder(recipe, output, resume=resume, fresh=False)
    return execute(planned, folder, progress_bar=False)


def die_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = Trainer._step

    def dying(trainer: Trainer, index: int) -> int:
        if index == step:
            raise KeyboardInterrupt
        return whole(trainer, index)

    monkeypatch.setattr(Trainer, "_step", dying)


def test_passes_change_nothing_but_rounding_and_steps_stay_optimiser_steps(run: Run) -> None:
    """A batch of 8 and the epoch's last of 4 in three passes, which divide neither."""
    one, three = run("one"), run("three", "training.accumulate=3")
    assert largest_difference(final_tensors(one), final_tensors(three)) <= 1e-5
    assert_close_metrics(one, three)


def test_every_row_is_computed_once_whatever_the_processes_and_passes() -> None:
    for size in (1, 2, 7, 8, 64):
        for passes in (1, 3, 9):
            for world in (1, 2, 5):
                of_ranks = [
                    shares_of(size, passes=passes, rank=rank, world=world) for rank in range(world)
                ]
                assert len({len(shares) for shares in of_ranks}) == 1
                own = [s.rows for shares in of_ranks for s in shares if not s.stands_in]
                assert sorted(torch.cat(own).tolist()) == list(range(size))
                assert all(len(s.rows) == 1 for shares in of_ranks for s in shares if s.stands_in)


def test_draws_of_a_share_are_those_of_the_whole_batch() -> None:
    policy = tiny_statevla()
    source = random_source(
        policy,
        seed=0,
        real_steps=torch.full((6,), 5),
        future_is_real=torch.ones(6, dtype=torch.bool),
        ahead=2,
    )
    objective = FlowMatchingObjective(FlowMatchingConfig(draws_per_sample=2), gripper_index=6)
    whole = objective.draw(source.batch(torch.arange(6)), torch.Generator().manual_seed(3))
    part = in_size_of(source.batch(torch.tensor([4, 5])), 6)
    again = objective.draw(part, torch.Generator().manual_seed(3))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_recomputed_activations_and_batches_read_ahead_change_no_bit(run: Run) -> None:
    plain = final_tensors(run("plain"))
    for option in ("activation_checkpointing=true", "loader_workers=3"):
        changed = run(option.partition("=")[0], f"training.{option}")
        assert largest_difference(final_tensors(changed), plain) == 0


def test_recomputed_activations_are_not_kept() -> None:
    from reflexarc.training.activation_checkpointing import checkpoint_activations

    def kept(policy: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        block = policy.blocks()[0]  # type: ignore[operator]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(torch.randn(4, 50, 16, requires_grad=True)).sum()
        return sum(sizes.values())

    policy = tiny_statevla()
    before = kept(policy)
    checkpoint_activations(policy)
    assert kept(policy) < before / 10


def test_a_loader_s_error_reaches_the_trainer() -> None:
    class Broken:
        def batch(self, indices: torch.Tensor) -> None:
            raise OSError("the disk is gone")

    with (
        BatchLoader(Broken(), lambda step: [torch.arange(2)], workers=2, total_steps=9) as loader,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        loader.batches(0)


def test_float16_goes_on_after_a_kill_with_its_loss_scale(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = "training.precision=fp16"
    whole = run("whole", option)
    die_in_step(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        run("killed", option)
    monkeypatch.undo()
    killed = run("killed", option, resume=True)
    assert largest_difference(final_tensors(whole), final_tensors(killed)) == 0
    assert metrics(whole) == metrics(killed)
    assert all(line["loss_scale"] > 0 for line in metrics(whole) if line["kind"] == "train")
    last = whole / (whole / "last").read_text().strip()
    assert {tensor.dtype for tensor in load_file(last / "model.safetensors").values()} == {
        torch.float32
    }
    progress = json.loads((last / "training_state" / "progress.json").read_text())
    assert progress["scaler"]["scale"] == metrics(whole)[-2]["loss_scale"]


def test_gradients_that_overflow_skip_the_step_and_lower_the_scale() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    precision = Precision("fp16", CPU)
    norms = GradientNorms({"policy.layer.w": layer.weight}, lambda tensor: tensor)
    before, scale = layer.weight.detach().clone(), precision.values
    precision.backward(layer(torch.full((1, 2), 1e36)).sum())
    precision.unscale(optimizer)
    told = precision.reported(norms.clip(1.0))
    precision.step(optimizer)
    assert torch.equal(layer.weight, before)
    assert scale()["loss_scale"] == 2.0**15
    assert told["skipped_steps"] == 1 and told["gradient_norm"] == 0
    precision.load_state({**(precision.state() or {}), "scale": 2.0**-20})
    with pytest.raises(TrainingDivergedError, match=r"precision=bf16"):
        precision.values()


def test_a_device_that_cannot_compute_in_a_precision_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_precision("bf16", CPU)

    def refuse(*arguments: object, **named: object) -> None:
        raise RuntimeError("unsupported autocast dtype")

    monkeypatch.setattr(torch, "autocast", refuse)
    with pytest.raises(ConfigError, match="fp16, which cpu cannot compute in"):
        check_precision("fp16", CPU)


def test_norms_of_groups_are_parts_of_the_norm_that_is_clipped() -> None:
    modules = nn.ModuleDict({"policy": nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}),
                             "objective": nn.ModuleDict({"p": nn.Linear(2, 2)})})  # fmt: skip
    parameters = dict(modules.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    told = GradientNorms(parameters, lambda tensor: tensor).clip(0.5)
    assert torch.equal(told.pop("gradient_norm"), expected)
    assert told.keys() == {f"gradient_norm/{g}" for g in ("a", "b", "objective.p")}
    torch.testing.assert_close(sum(v.square() for v in told.values()), expected.square())
    clipped = [p.grad for p in parameters.values() if p.grad is not None]
    torch.testing.assert_close(nn.utils.get_total_norm(clipped), torch.tensor(0.5))


def test_a_line_says_where_time_and_memory_go(run: Run) -> None:
    lines = (run("run") / "metrics.jsonl").read_text().splitlines()
    line = next(values for values in map(json.loads, lines) if values["kind"] == "train")
    for part in ("data", "forward", "backward", "optimizer", "other"):
        assert line[f"time/{part}"] > 0
    groups = {name for name in line if name.startswith("gradient_norm/")}
    assert groups == {f"gradient_norm/{g}" for g in ("representation", "flow", "gripper")}
    assert line["memory/rss_mb"] > 100


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within the block the system refuses to write any file beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [60_000, 400_000])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    run: Run, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """It may fill up while the served weights are written, or while the training state is."""
    whole = run("whole")
    die_in_step(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        run("run")
    monkeypatch.undo()
    folder = whole.with_name("run")
    saved = folder / "checkpoints" / "step_00000005"
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with (
        files_of_at_most(size),
        pytest.raises(DiskFullError, match=r"`last` is still step_0+5") as full,
    ):
        run("run", resume=True)
    assert full.value.code == "disk_full" and "--resume" in full.value.message
    assert (folder / "last").read_text().strip() == "checkpoints/step_00000005"
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        saved.name,
        "ranking.json",
    }
    resumed = run("run", resume=True)
    assert largest_difference(final_tensors(resumed), final_tensors(whole)) == 0
    assert metrics(resumed) == metrics(whole)


def test_a_run_of_one_process_cannot_be_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes("ddp", "cpu").world == 1
    with pytest.raises(ConfigError, match="torchrun"):
        join_processes("fsdp2", "cpu")
    with pytest.raises(ConfigError, match="auto, ddp, fsdp2, zero2, deepspeed"):
        join_processes("zero3", "cpu")
