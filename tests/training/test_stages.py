"""Two stages: a temporal JEPA, then flow matching from its weights; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.training.outcome import Outcome
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.run_folder import exclusive
from reflexarc.training.session import check_start, execute, open_run_folder, plan
from reflexarc.training.trainer import Trainer

CPU = torch.device("cpu")


def run(
    recipe_in_two_stages: Path,
    stage: int,
    output: Path,
    *overrides: str,
    init_from: Path | None = None,
    resume: bool = False,
    from_scratch: bool = False,
) -> Outcome:
    """What ``reflexarc train`` does."""
    recipe = load_recipe(
        str(recipe_in_two_stages), overrides, stage=stage, from_scratch=from_scratch
    )
    check_start(recipe, str(recipe_in_two_stages), output, init_from=init_from, resume=resume)
    cache = output.parent / "cache"
    planned = plan(recipe, output, device=CPU, feature_cache=cache, init_from=init_from)
    folder = open_run_folder(recipe, output, resume=resume, fresh=False)
    return execute(planned, folder, progress_bar=False)


@pytest.fixture(scope="module")
def first(recipe_in_two_stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete stage-1 run."""
    output = tmp_path_factory.mktemp("first") / "run"
    run(recipe_in_two_stages, 1, output)
    return output


def tensors(checkpoint: Path | None, name: str = "model.safetensors") -> dict[str, Tensor]:
    assert checkpoint is not None
    return load_file(checkpoint / name)


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    """First parts of the names of the tensors that differ."""
    assert one.keys() == two.keys()
    return {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}


def last(output: Path) -> Path:
    return output / (output / "last").read_text().strip()


def test_stage_one_trains_the_representation_alone(first: Path) -> None:
    checkpoint = last(first)
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in validated] == [3, 6]
    assert {"total", "prediction", "variance", "covariance"} <= validated[0].keys()
    assert "action_mae" not in validated[0]  # its heads are random: nothing was sampled
    provenance = load_checkpoint(checkpoint).provenance
    assert provenance["best_metric"]["name"] == "total"
    assert provenance["best_metric"]["value"] == min(line["total"] for line in validated)
    assert provenance["recipe"]["stage"]["number"] == 1
    assert provenance["action_heads_trained"] is False
    moments = load_file(checkpoint / "training_state" / "tensors.safetensors")
    moved = {name for name in moments if name.startswith("exp_avg/")}
    assert {name.split("/")[1].split(".")[0] for name in moved} == {"policy", "objective"}
    assert not any(".flow." in name or ".gripper." in name for name in moved)


def test_the_objectives_tensors_stand_in_the_checkpoint_for_a_probe(first: Path) -> None:
    own = tensors(last(first), "objective.safetensors")
    served = tensors(last(first))
    targets = {n for n in own if n.startswith("target.")}
    assert {"predictor.delta.weight"} | targets <= own.keys() and targets
    # The target is a copy of all that makes z, and lags behind what is served.
    for name in targets:
        assert own[name].shape == served[name.replace("target.", "representation.")].shape
    manifest = json.loads((last(first) / "policy.json").read_text())
    assert "objective.safetensors" not in manifest["files"]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_broken_and_resumed_stage_ends_with_the_same_weights(
    recipe_in_two_stages: Path,
    first: Path,
    tmp_path: Path,
    stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = first if stage == 2 else None
    whole = run(recipe_in_two_stages, stage, tmp_path / "whole", init_from=start)
    step = Trainer._step

    def dying(trainer: Trainer, index: int) -> int:
        if index == 5:
            raise KeyboardInterrupt
        return step(trainer, index)

    monkeypatch.setattr(Trainer, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_in_two_stages, stage, tmp_path / "broken", init_from=start)
    monkeypatch.undo()
    assert last(tmp_path / "broken").name == "step_00000004"
    # The run has weights of its own by now: it does not need --init-from a second time.
    resumed = run(recipe_in_two_stages, stage, tmp_path / "broken", resume=True)
    assert differing(tensors(whole.last), tensors(resumed.last)) == set()
    state = "training_state/tensors.safetensors"
    assert differing(tensors(whole.last, state), tensors(resumed.last, state)) == set()
    target = {n for n in tensors(resumed.last, state) if n.startswith("weight/objective.target.")}
    assert bool(target) == (stage == 1)
    assert whole.progress.best_metric == resumed.progress.best_metric
    assert whole.last and resumed.last
    origins = {load_checkpoint(path).provenance["init_from"] is None
               for path in (whole.last, resumed.last)}  # fmt: skip
    assert origins == {stage == 1}


def test_stage_two_trains_the_heads_on_the_frozen_representation(
    recipe_in_two_stages: Path, first: Path, tmp_path: Path
) -> None:
    outcome = run(recipe_in_two_stages, 2, tmp_path / "run", init_from=first)
    before, after = tensors(last(first)), tensors(outcome.last)
    assert differing(before, after) == {"flow", "gripper"}
    state = tensors(outcome.last, "training_state/tensors.safetensors")
    assert not [name for name in state if "exp_avg/policy.representation" in name]
    loaded = load_checkpoint(outcome.last) if outcome.last else None
    assert loaded is not None
    assert loaded.provenance["init_from"] == {
        "recipe": "tiny_temporal",
        "stage": load_checkpoint(last(first)).provenance["recipe"]["stage"],
        "step": 6,
        "fingerprint": load_checkpoint(last(first)).fingerprint,
    }
    assert loaded.provenance["action_heads_trained"] is True
    # A checkpoint's folder does as well as its run's.
    again = run(recipe_in_two_stages, 2, tmp_path / "again", init_from=last(first))
    assert differing(after, tensors(again.last)) == set()


def test_a_frozen_representation_stays_in_eval_mode(
    recipe_in_two_stages: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    step = Trainer._step

    def watched(trainer: Trainer, index: int) -> int:
        policy = trainer.policy
        modes.append((policy.representation.training, policy.flow.training))  # type: ignore[union-attr]
        return step(trainer, index)

    monkeypatch.setattr(Trainer, "_step", watched)
    run(recipe_in_two_stages, 2, tmp_path / "run", init_from=first)
    assert set(modes) == {(False, True)} and len(modes) == 6  # with a validation in between


def test_fine_tuning_moves_the_representation_more_slowly(
    recipe_in_two_stages: Path, first: Path, tmp_path: Path
) -> None:
    def moved(name: str, *overrides: str) -> float:
        output, unfrozen = tmp_path / name, ("freeze=[]", "training.ema_decay=null")
        outcome = run(recipe_in_two_stages, 2, output, *unfrozen, *overrides, init_from=first)
        before, after = tensors(last(first)), tensors(outcome.last)
        name = "representation.encoder.projection.weight"
        return float((after[name] - before[name]).abs().max())

    fast = moved("fast")
    slow = moved("slow", "learning_rate_scale={representation: 0.1}")
    assert 0 < slow < 0.3 * fast


def test_stage_two_without_weights_names_the_command_that_makes_them(
    recipe_in_two_stages: Path, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"train .*tiny_temporal\.yaml --stage 1 --output DIR"):
        run(recipe_in_two_stages, 2, tmp_path / "run")
    with pytest.raises(ConfigError, match="starts here from random weights"):
        run(recipe_in_two_stages, 1, tmp_path / "run", init_from=first)
    with pytest.raises(ConfigError, match="leave out either"):
        run(recipe_in_two_stages, 2, tmp_path / "run", init_from=first, from_scratch=True)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        run(recipe_in_two_stages, 2, tmp_path / "run", init_from=tmp_path / "absent")
    assert not (tmp_path / "run").exists()
    scratch = run(recipe_in_two_stages, 2, tmp_path / "scratch", from_scratch=True)
    assert differing(tensors(last(first)), tensors(scratch.last)) == {
        "representation", "flow", "gripper"
    }  # fmt: skip


def test_other_weights_than_the_stage_befores_are_refused_by_key(
    recipe_in_two_stages: Path, first: Path, tmp_path: Path, demonstrations: Path,
    task_file: Callable[..., Path],
) -> None:  # fmt: skip
    def refused(message: str, *overrides: str, init_from: Path = first) -> None:
        with pytest.raises(ConfigError, match=message):
            run(recipe_in_two_stages, 2, tmp_path / "run", *overrides, init_from=init_from)
        assert not (tmp_path / "run").exists()

    refused(r"policy\.d_state: 4 -> 8; policy\.policy_layers: 1 -> 2. Give the settings",
            "policy.d_state=8", "policy.policy_layers=2")  # fmt: skip
    refused(r"here\): contract\.cameras\[0\]\.height: 32 -> 48; contract\.cameras\[0\]\.width: ",
            "contract.image_size=48")  # fmt: skip
    refused(
        r"contract\.state\.layout: 'eef3.*' -> 'joint7", "contract.state_layout=joint7+fingers2"
    )
    refused(r"state\.mean\[eef_x\]: .* -> .*Give the demonstrations", "data.split_seed=1")
    other = task_file(tmp_path / "another_task_demo.hdf5", seed=5)
    refused(r"normalises otherwise", f"data.paths=['{other}']")
    refused(r"trained by stage 1 \(representation\) of 'tiny_temporal'; other starts", "name=other")

    second = tmp_path / "second"
    run(recipe_in_two_stages, 2, second, init_from=first)
    refused(r"trained by stage 2 \(policy\)", init_from=second)
    single = load_recipe("statevla_tiny", [f"data.paths=['{demonstrations}']", "training.epochs=1"])
    planned = plan(single, tmp_path / "single", device=CPU, feature_cache=tmp_path / "cache")
    execute(planned, open_run_folder(single, tmp_path / "single", resume=False, fresh=False))
    refused("trained by a recipe without stages of 'statevla_tiny'", init_from=tmp_path / "single")


def test_a_resumed_stage_refuses_other_weights_to_start_from(
    recipe_in_two_stages: Path, first: Path, tmp_path: Path
) -> None:
    run(recipe_in_two_stages, 2, tmp_path / "run", init_from=first)
    other = tmp_path / "other"
    run(recipe_in_two_stages, 1, other, "training.seed=7")
    with pytest.raises(ConfigError, match="leave out --init-from to resume it"):
        run(recipe_in_two_stages, 2, tmp_path / "run", init_from=other, resume=True)


def test_a_module_that_is_not_there_is_named(recipe_in_two_stages: Path, tmp_path: Path) -> None:
    for key, value in (("freeze", "[encodr]"), ("learning_rate_scale", "{encodr: 0.1}")):
        with pytest.raises(ConfigError, match=rf"{key} names the module 'encodr'.*representation"):
            run(recipe_in_two_stages, 1, tmp_path / "run", f"{key}={value}")


def test_a_horizon_that_the_images_do_not_offer_is_refused(
    recipe_in_two_stages: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="offers: 4, 8, 12"):
        run(recipe_in_two_stages, 1, tmp_path / "run", "objective.horizon=2")


def test_a_folder_is_trained_in_by_one_process(tmp_path: Path) -> None:
    with exclusive(tmp_path / "run"):
        refused = pytest.raises(ConfigError, match="another 'reflexarc train' is writing")
        with refused, exclusive(tmp_path / "run"):
            pass
        with exclusive(tmp_path / "other"):
            pass
    with exclusive(tmp_path / "run"):
        pass
