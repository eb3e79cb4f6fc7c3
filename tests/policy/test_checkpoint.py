"""A checkpoint comes back as it was saved, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from reflexarc.contract import NormalizationStatistics
from reflexarc.contract.errors import CheckpointError, ConfigError
from reflexarc.policy.checkpoint import load_checkpoint, save_checkpoint
from reflexarc.policy.checkpoint_files import sha256, write_pointer
from reflexarc.policy.statevla.model import StateVLA

FILES = [
    "language_embeddings.json",
    "language_embeddings.safetensors",
    "model.safetensors",
    "norm_stats.json",
    "policy.json",
]


def rewrite_manifest(folder: Path, **changes: object) -> None:
    path = folder / "policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its hash, as somebody would who edits a checkpoint by hand."""
    (folder / name).write_bytes(content)
    entries = json.loads((folder / "policy.json").read_text())["files"]
    entries[name] = {"sha256": sha256(content), "bytes": len(content)}
    rewrite_manifest(folder, files=entries)


def test_a_checkpoint_comes_back(
    saved: Path, policy: StateVLA, statistics: NormalizationStatistics
) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    loaded = load_checkpoint(saved)
    assert isinstance(loaded.policy, StateVLA)
    assert loaded.policy.config == policy.config
    assert loaded.statistics == statistics
    assert loaded.provenance == {"recipe": "tiny", "seed": 0}
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor), name
    contract = loaded.policy.contract
    assert contract.statistics_sha256 == statistics.sha256()
    assert contract.checkpoint_fingerprint == sha256((saved / "policy.json").read_bytes())
    assert loaded.fingerprint == contract.checkpoint_fingerprint
    assert not any(module.training for module in loaded.policy.modules())
    assert not any(parameter.requires_grad for parameter in loaded.policy.parameters())


def test_frozen_weights_are_named_not_stored(saved: Path, policy: StateVLA) -> None:
    stored = safetensors.torch.load_file(saved / "model.safetensors")
    assert not any(name.startswith("vision.") for name in stored)
    assert sum(t.numel() for t in stored.values()) == sum(policy.component_parameters().values())
    manifest = json.loads((saved / "policy.json").read_text())
    identity = policy.vision.identity
    assert manifest["frozen_backbones"] == {
        "vision": {"name": "tiny_random", "sha256": identity.sha256}
    }


def test_a_loaded_checkpoint_saves_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(saved)
    again = save_checkpoint(tmp_path / "again", loaded.policy, loaded.statistics, loaded.provenance)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }


def test_saving_replaces_a_checkpoint_whole(
    saved: Path, policy: StateVLA, statistics: NormalizationStatistics
) -> None:
    (saved / "training_state").mkdir()
    with torch.no_grad():
        policy.representation.tokenizer.modality.add_(1.0)
    save_checkpoint(saved, policy, statistics, {"step": 2})
    assert load_checkpoint(saved).provenance == {"step": 2}
    assert sorted(path.name for path in saved.iterdir()) == FILES
    assert [path.name for path in saved.parent.iterdir()] == ["policy"]


def test_a_failed_save_leaves_the_earlier_checkpoint(
    saved: Path, policy: StateVLA, statistics: NormalizationStatistics
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def out_of_space(folder: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(saved, policy, statistics, {"step": 2}, write_also=out_of_space)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["policy"]


def test_more_files_appear_together_with_the_rest(
    tmp_path: Path, policy: StateVLA, statistics: NormalizationStatistics
) -> None:
    def write_training_state(folder: Path) -> None:
        assert folder != tmp_path / "run"
        (folder / "training_state").mkdir()
        (folder / "training_state" / "position.json").write_text("{}")

    saved = save_checkpoint(
        tmp_path / "run", policy, statistics, {}, write_also=write_training_state
    )
    assert (saved / "training_state" / "position.json").read_text() == "{}"
    load_checkpoint(saved)


def test_a_folder_of_other_files_is_not_replaced(
    tmp_path: Path, policy: StateVLA, statistics: NormalizationStatistics
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a checkpoint; choose another name"):
        save_checkpoint(tmp_path, policy, statistics, {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_statistics_of_another_layout_are_not_saved(
    tmp_path: Path, policy: StateVLA, statistics: NormalizationStatistics
) -> None:
    names = tuple(reversed(statistics.action.names))
    other = statistics.model_copy(
        update={"action": statistics.action.model_copy(update={"names": names})}
    )
    with pytest.raises(ConfigError):
        save_checkpoint(tmp_path / "x", policy, other, {})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", [name for name in FILES if name != "policy.json"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", [name for name in FILES if name != "policy.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_an_altered_file_is_named(saved: Path, name: str, cut: bool) -> None:
    content = bytearray((saved / name).read_bytes())
    if cut:
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} was altered"):
        load_checkpoint(saved)


def another_version(folder: Path) -> None:
    rewrite_manifest(folder, format_version=99)


def no_version(folder: Path) -> None:
    manifest = json.loads((folder / "policy.json").read_text())
    del manifest["format_version"]
    (folder / "policy.json").write_text(json.dumps(manifest))


def no_json(folder: Path) -> None:
    (folder / "policy.json").write_bytes(b"\x80\x04pickled")


def a_list(folder: Path) -> None:
    (folder / "policy.json").write_text("[]")


def an_unknown_key(folder: Path) -> None:
    rewrite_manifest(folder, surprise=1)


def an_unknown_family(folder: Path) -> None:
    rewrite_manifest(folder, family="perceiver")


def an_unknown_option(folder: Path) -> None:
    config = json.loads((folder / "policy.json").read_text())["config"]
    rewrite_manifest(folder, config={**config, "heads": 8})


def another_width(folder: Path) -> None:
    config = json.loads((folder / "policy.json").read_text())["config"]
    rewrite_manifest(folder, config={**config, "d_model": 48})


def another_backbone(folder: Path) -> None:
    entry = {"vision": {"name": "tiny_random", "sha256": "0" * 64}}
    rewrite_manifest(folder, frozen_backbones=entry)


def a_path_outside(folder: Path) -> None:
    entries = json.loads((folder / "policy.json").read_text())["files"]
    entries["../secret"] = {"sha256": "0" * 64, "bytes": 1}
    rewrite_manifest(folder, files=entries)


def no_weights_listed(folder: Path) -> None:
    entries = json.loads((folder / "policy.json").read_text())["files"]
    del entries["model.safetensors"]
    rewrite_manifest(folder, files=entries)


def one_tensor_fewer(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["representation.encoder.norm.weight"]
    replace_file(folder, "model.safetensors", safetensors.torch.save(weights))


def one_tensor_more(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["vision.patches.weight"] = torch.zeros(1)
    replace_file(folder, "model.safetensors", safetensors.torch.save(weights))


def pickled_weights(folder: Path) -> None:
    replace_file(folder, "model.safetensors", b"\x80\x04\x95")


def other_statistics(folder: Path) -> None:
    statistics = json.loads((folder / "norm_stats.json").read_text())
    statistics["state"]["mean"][0] += 1
    replace_file(folder, "norm_stats.json", json.dumps(statistics).encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_version, "format version 99, this installation reads 1"),
        (no_version, "format version None"),
        (no_json, "is not JSON"),
        (a_list, "format version None"),
        (an_unknown_key, "surprise"),
        (an_unknown_family, "unknown policy family 'perceiver'; known: mobile_vla"),
        (an_unknown_option, "heads"),
        (another_width, "another shape or dtype of flow.action_in.bias"),
        (another_backbone, r"frozen vision tiny_random \(000000000000…\), installed is tiny"),
        (a_path_outside, "'../secret': refused"),
        (no_weights_listed, "lists no model.safetensors"),
        (one_tensor_fewer, "it lacks representation.encoder.norm.weight"),
        (one_tensor_more, "it has the unexpected vision.patches.weight"),
        (pickled_weights, "model.safetensors cannot be read"),
        (other_statistics, "norm_stats.json is not what the contract names"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


def test_a_file_in_place_of_a_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "policy.pt").write_bytes(b"\x80\x04")
    for path in (tmp_path / "policy.pt", saved / "model.safetensors", saved / "policy.json"):
        with pytest.raises(CheckpointError, match=r"is the folder that holds policy\.json"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither policy.json nor a pointer file"):
        load_checkpoint(tmp_path / "empty")


def test_a_run_points_at_its_checkpoints(
    tmp_path: Path, saved: Path, statistics: NormalizationStatistics
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoints" / "step-10")
    shutil.copytree(saved, run / "step-20")
    write_pointer(run, "last", "step-20")
    assert load_checkpoint(run).directory == run / "step-20"
    write_pointer(run, "best", "checkpoints/step-10")
    assert load_checkpoint(run).directory == run / "checkpoints" / "step-10"
    assert sorted(path.name for path in run.iterdir()) == ["best", "checkpoints", "last", "step-20"]


@pytest.mark.parametrize("target", ["../policy", "/etc", "", "a\nb", "nowhere"])
def test_a_pointer_leads_to_a_checkpoint_of_its_run(
    tmp_path: Path, saved: Path, target: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "last").write_text(target)
    with pytest.raises(CheckpointError, match="pointer file"):
        load_checkpoint(run)
