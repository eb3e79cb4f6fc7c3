"""What started the processes of a run is followed, or refused by name where the recipe differs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import Recipe
from reflexarc.training.distributed.deepspeed_config import (
    check_deepspeed_config,
    read_deepspeed_config,
    resolved_deepspeed_config,
)
from reflexarc.training.distributed.launch import check_devices, check_recipe, join_processes
from reflexarc.training.recipe_files import load_recipe

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", *FSDP, *DEEPSPEED):
        monkeypatch.delenv(name, raising=False)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("statevla_tiny", list(overrides))


def told(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_what_accelerate_sets_by_itself_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="NO",
         ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1", ACCELERATE_USE_CPU="False")  # fmt: skip
    engine = join_processes("auto", "cpu")
    check_recipe(engine, recipe("training.precision=bf16", "training.accumulate=4"))


@pytest.mark.parametrize(
    ("variable", "value", "mend"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "training.precision=bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "the recipe decides"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.accumulate=4"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.25", "optimizer.gradient_clip=0.25"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "training.activation_checkpointing=true"),
    ],
)
def test_a_setting_other_than_the_recipe_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, mend: str
) -> None:
    engine = join_processes("auto", "cpu")
    told(monkeypatch, **{variable: value})
    with pytest.raises(ConfigError, match=mend) as refused:
        check_recipe(engine, recipe())
    assert refused.value.field == variable


def test_a_setting_that_the_recipe_shares_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_GRADIENT_CLIPPING="1.0",
         FSDP_ACTIVATION_CHECKPOINTING="true")  # fmt: skip
    shared = ("training.precision=bf16", "optimizer.gradient_clip=1.0")
    check_recipe(
        join_processes("auto", "cpu"), recipe(*shared, "training.activation_checkpointing=true")
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
        ({**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}, "own blocks"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "own blocks"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-2"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "OFFLOAD"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend no"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "one process"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "torchrun --nproc-per-node 4"),
    ],
)
def test_a_launch_that_no_engine_follows_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], match: str
) -> None:
    told(monkeypatch, **settings)
    with pytest.raises(ConfigError, match=match):
        join_processes("auto", "cpu")


def test_an_engine_and_a_launcher_that_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told(monkeypatch, **TWO, **FSDP)
    with pytest.raises(ConfigError, match="told fsdp2"):
        join_processes("ddp", "cpu")
    told(monkeypatch, FSDP_RESHARD_AFTER_FORWARD="false")
    with pytest.raises(ConfigError, match="told zero2"):
        join_processes("fsdp2", "cpu")
    told(monkeypatch, ACCELERATE_USE_CPU="true")
    with pytest.raises(ConfigError, match="--device is cuda"):
        join_processes("auto", "cuda")


def test_more_processes_than_gpus_are_refused() -> None:
    check_devices(4, 4)
    with pytest.raises(ConfigError, match="--nproc-per-node 4"):
        check_devices(8, 4)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_the_package_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, **TWO)
    with pytest.raises(ConfigError, match=r"pip install 'reflexarc\[deepspeed\]'"):
        join_processes("deepspeed", "cpu")


def test_the_packaged_deepspeed_configuration_leaves_everything_to_the_recipe() -> None:
    values = read_deepspeed_config(None)
    check_deepspeed_config(values, recipe())
    given = resolved_deepspeed_config(values, 0.5)
    assert given["gradient_clipping"] == 0.5 and given["zero_optimization"]["stage"] == 2
    assert "auto" not in json.dumps(given)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"train_batch_size": 12}, "train_batch_size"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps"),
        ({"gradient_clipping": 7.0}, "gradient_clipping"),
    ],
)
def test_a_deepspeed_configuration_other_than_the_recipe_is_refused(
    changed: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_deepspeed_config({**read_deepspeed_config(None), **changed}, recipe())
    assert refused.value.field is not None and field in refused.value.field


def test_fp16_and_a_file_that_is_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bf16"):
        check_deepspeed_config(read_deepspeed_config(None), recipe("training.precision=fp16"))
    with pytest.raises(ConfigError, match="is no file"):
        read_deepspeed_config(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{'stage': 2}")
    with pytest.raises(ConfigError, match="not JSON"):
        read_deepspeed_config(broken)
    with pytest.raises(ConfigError, match="--engine deepspeed"):
        join_processes("ddp", "cpu", deepspeed_config=broken)
