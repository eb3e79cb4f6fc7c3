"""The full-size recipe says what the document's tables say, or a reason stands here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reflexarc.contract.policy_contract import libero_action
from reflexarc.policy.backbones.geometry_mapanything import PARAMETERS
from reflexarc.policy.backbones.qwen2_5_vl import build_qwen
from reflexarc.policy.qwen_geometry.compressors import build_compressor
from reflexarc.policy.qwen_geometry.config import QwenGeometryConfig
from reflexarc.policy.qwen_geometry.head import DiffusionHead
from reflexarc.training.ablation import ABLATIONS, arm_overrides, places
from reflexarc.training.config import Recipe
from reflexarc.training.recipe_files import load_recipe

DOCUMENT = yaml.safe_load(Path(__file__).with_name("qwen_document.yaml").read_text())
NAME = "qwen_geometry_libero_all"
GEOMETRY_CHANNELS = DOCUMENT["shared"]["geom_dim"]
# The class's own defaults are those of another size: the 3B model's config.json, spelt out.
QWEN_3B = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_window_layers": 70, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Differs:
    """What we have instead, and why."""

    ours: Any
    reason: str


def recipe() -> Recipe:
    return load_recipe(NAME)


def config() -> QwenGeometryConfig:
    return QwenGeometryConfig.model_validate(recipe().policy)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def sizes() -> dict[str, int]:
    """Numbers by the document's names, without memory; MapAnything's is the document's own."""
    ours, width = config(), QWEN_3B["text_config"]["hidden_size"]  # type: ignore[index]
    with torch.device("meta"):
        head = DiffusionHead(
            ours.head, source=width, state=8, horizon=recipe().contract.horizon, actions=7
        )
        compressors = {
            form: count(
                build_compressor(
                    form,  # type: ignore[arg-type]
                    GEOMETRY_CHANNELS, width, layers=ours.head.layers,
                    tokens=ours.geometry_tokens, heads=ours.qformer_heads,
                )
            )
            for form in DOCUMENT["strategies"]
        }  # fmt: skip
        qwen = count(build_qwen(QWEN_3B))
    return {
        "qwen_vl_interface": qwen,
        "mapanything_encoder": PARAMETERS,
        "action_model": count(head),
        **compressors,
    }


def test_sizes_are_the_documents() -> None:
    found = sizes()
    for name, stated in DOCUMENT["parameters_millions"].items():
        assert round(found[name] / 1e6, 2) == pytest.approx(stated, abs=5e-3), name
    assert found["pool"] == 1536 * 2048 + 2048
    assert found["per_layer"] == 16 * found["pool"]


@pytest.mark.parametrize("strategy", DOCUMENT["strategies"])
def test_totals_are_the_documents(strategy: str) -> None:
    found = sizes()
    trained = found["qwen_vl_interface"] + found["action_model"] + found[strategy]
    total = trained + found["mapanything_encoder"]
    # The document rounds up or down; it is off by less than half a million either way.
    assert abs(total / 1e6 - DOCUMENT["totals_millions"][strategy]) < 1
    assert abs(trained / 1e6 - DOCUMENT["trainable_millions"][strategy]) < 1


def test_self_attention_adds_about_268_millions() -> None:
    head = config().head
    with torch.device("meta"):
        with_it = DiffusionHead(
            head.model_copy(update={"self_attention": True}),
            source=2048, state=8, horizon=8, actions=7,
        )  # fmt: skip
    assert round((count(with_it) - sizes()["action_model"]) / 1e6) == 269


def batch_of_a_pass(r: Recipe) -> int:
    assert r.training.batch_size % r.training.accumulate == 0
    return r.training.batch_size // r.training.accumulate


def rate(module: str) -> Callable[[Recipe], float]:
    return lambda r: r.optimizer.learning_rate * r.learning_rate_scale.get(module, 1.0)


READ: dict[str, Callable[[Recipe], Any]] = {
    "shared.Framework": lambda r: r.family,
    "shared.base_vlm": lambda r: (
        "Qwen2.5-VL-3B" if "Qwen2.5-VL-3B" in r.policy["semantic"]["path"] else "another"
    ),
    "shared.mapanything_model_path": lambda r: r.policy["geometry"]["name"],
    "shared.data_mix": lambda r: r.name.removeprefix("qwen_geometry_"),
    "shared.per_device_batch_size": batch_of_a_pass,
    "shared.gradient_accumulation_steps": lambda r: r.training.accumulate,
    "shared.max_train_steps": lambda r: r.training.steps,
    "shared.save_interval": lambda r: r.training.checkpoint_every,
    "shared.eval_interval": lambda r: r.training.validate_every,
    "shared.seed": lambda r: r.training.seed,
    "shared.dit_layers": lambda r: r.policy["head"]["layers"],
    "shared.geom_dit_tokens": lambda r: r.policy["geometry_tokens"],
    "shared.action_dim": lambda r: libero_action(r.contract.horizon).dimension,
    "shared.action_horizon": lambda r: r.contract.horizon,
    "shared.future_action_window_size": lambda r: r.contract.horizon - 1,
    "shared.freeze_modules": lambda r: list(r.freeze),
    "shared.geom_qformer_heads": lambda r: r.policy["qformer_heads"],
    "shared.images": lambda r: r.contract.image_size,
    "shared.vlm_hidden": lambda r: r.policy["head"]["heads"] * r.policy["head"]["head_dimension"],
    "shared.geom_dim": lambda r: (sizes()["pool"] // 2048) - 1,
    "shared.cache_dtype": lambda r: r.data.feature_dtype,
    "shared.wandb_project": lambda r: r.reporting.project,
    "learning_rates.base": lambda r: r.optimizer.learning_rate,
    "learning_rates.qwen_vl_interface": rate("semantic"),
    "learning_rates.action_model": rate("head"),
    "learning_rates.geom_compressor": rate("compressor"),
    "mixture": lambda r: {source.path.name: source.episodes for source in r.data.sources},
    "episodes": lambda r: sum(source.episodes or 0 for source in r.data.sources),
    "effective_batch": lambda r: r.training.batch_size,
    "checkpoints": lambda r: list(
        range(r.training.keep_every or 0, (r.training.steps or 0) + 1, r.training.keep_every or 1)
    ),
    "strategies": lambda r: [a for a in ABLATIONS["geometry"].default if a != "none"],
    "ports": lambda r: [int(p.environment["MASTER_PORT"]) for p in places(range(3), 3, "auto")],  # type: ignore[arg-type]
    "gpus": lambda r: [
        int(p.environment["CUDA_VISIBLE_DEVICES"])
        for p in places(range(3), 3, "auto")  # type: ignore[arg-type]
    ],
    "tokens_per_view": lambda r: (r.contract.image_size // 14) ** 2,
}
"""The document's key to our value of it."""

DEVIATIONS = {
    "shared.Framework": Differs("qwen_geometry", "our name of the family"),
    "shared.freeze_modules": Differs(["geometry"], "our name of the module"),
    "tokens_per_view": Differs(
        256, "a patch of 14 pixels gives 16 x 16 tokens of a view of 224; 196 are those of 16"
    ),
}
ELSEWHERE = {
    "server": "reflexarc serve-policy --port 10093 --precision bf16",
    "parameters_millions": "test_sizes_are_the_documents",
    "totals_millions": "test_totals_are_the_documents",
    "trainable_millions": "test_totals_are_the_documents",
}

COVERED = {
    "policy.semantic.name", "policy.semantic.path", "policy.geometry.name", "policy.head.layers",
    "policy.head.heads", "policy.head.head_dimension", "policy.geometry_tokens",
    "policy.qformer_heads", "policy.compressor", "contract.horizon", "contract.image_size",
    "data.sources", "data.feature_dtype", "optimizer.learning_rate", "freeze",
    "learning_rate_scale.head", "learning_rate_scale.compressor", "training.batch_size",
    "training.accumulate", "training.steps", "training.seed", "training.validate_every",
    "training.checkpoint_every", "training.keep_every", "reporting.project",
}  # fmt: skip
BEYOND = {
    # What the published code of the document's framework has, where the document is silent.
    "policy.head.feed_forward", "policy.head.future_tokens", "policy.head.positions",
    "policy.head.output_dimension", "policy.head.output_hidden", "policy.head.state_hidden",
    "policy.denoising_steps", "objective.name", "objective.time_density",
    "objective.draws_per_sample", "optimizer.betas", "optimizer.weight_decay",
    "optimizer.gradient_clip", "schedule.name", "schedule.warmup_steps",
    "schedule.final_fraction", "contract.state_normalization", "contract.action_normalization",
    "contract.cameras", "training.precision", "training.log_every",
    # How our reader calls what the four folders hold.
    "contract.orientation", "data.cameras.agentview", "data.cameras.eye_in_hand",
    "data.state.eef", "data.state.axisangle", "data.state.fingers", "data.action.motion",
    "data.action.gripper", "data.action_kind", "data.gripper.name", "data.gripper.open",
    "data.gripper.closed",
    # Ours: held-out episodes are validated, not the next training batch; a norm before tokens
    # are joined, which learns as fast as the compressor whose output it takes; the rest is off.
    "data.validation_fraction", "data.split_by", "policy.normed", "learning_rate_scale.joining",
    "training.best_metric", "policy.geometry.path", "policy.geometry.precision",
    "policy.semantic.max_instruction_tokens", "policy.head.self_attention",
    "policy.head.state_octaves", "policy.head.dropout", "policy.noise_scale",
    "objective.flow_weight", "objective.state_noise",
}  # fmt: skip


def flat(values: Mapping[str, Any], keep: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        nested = isinstance(value, Mapping) and path not in keep
        found |= flat(value, keep, f"{path}.") if nested else {path: value}
    return found


STATED = {
    key: value
    for key, value in flat(DOCUMENT, ("mixture", *ELSEWHERE)).items()
    if key not in ELSEWHERE
}


@pytest.mark.parametrize("key", STATED)
def test_a_setting_is_the_documents_or_has_its_reason(key: str) -> None:
    ours, stated = READ[key](recipe()), STATED[key]
    if key in DEVIATIONS:
        assert ours != stated, f"{key} no longer differs: take it off the list"
        assert ours == DEVIATIONS[key].ours and DEVIATIONS[key].reason
    else:
        assert ours == pytest.approx(stated) if isinstance(stated, float) else ours == stated


def test_nothing_is_left_out_on_either_side() -> None:
    assert READ.keys() == STATED.keys()
    folder = resources.files("reflexarc.training") / "recipes"
    written = yaml.safe_load((folder / f"{NAME}.yaml").read_text())
    keys = {key for key in flat(written) if key not in ("name", "description", "family")}
    assert keys == BEYOND | COVERED
    assert not BEYOND & COVERED


def test_arms_differ_in_one_key() -> None:
    ablation = ABLATIONS["geometry"]
    plain = recipe().model_dump(mode="json")
    for arm in ablation.default:
        own = load_recipe(NAME, arm_overrides(ablation, arm, "together")).model_dump(mode="json")
        assert own["policy"]["compressor"] == arm
        assert own["reporting"]["group"] == "together"
        own["policy"]["compressor"] = plain["policy"]["compressor"]
        own["reporting"]["group"] = plain["reporting"]["group"]
        assert own == plain
