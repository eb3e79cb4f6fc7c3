"""DeepSpeed's configuration file: what it may say, and what the recipe says in its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from reflexarc.contract.errors import ConfigError
from reflexarc.training.config import Recipe

PACKAGED = "deepspeed_zero2.json"
_FIELD = "deepspeed_config"
_PRECISIONS = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")
_OTHERS = {
    "optimizer": "the recipe's optimizer",
    "scheduler": "the recipe's schedule",
    "sparse_attention": "nothing here",
    "compression_training": "nothing here",
    "data_efficiency": "nothing here",
    "curriculum_learning": "nothing here",
}


def read_deepspeed_config(path: Path | None) -> dict[str, Any]:
    """The keys of a JSON file; of the packaged one without a path.

    Raises ConfigError when the file is not there or not a JSON object.
    """
    if path is None:
        text = (resources.files("reflexarc.training.distributed") / PACKAGED).read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise ConfigError(f"--deepspeed-config {path} is no file", field=_FIELD)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--deepspeed-config {path} is not JSON: {error}", field=_FIELD) from None
    if not isinstance(values, dict):
        raise ConfigError(f"--deepspeed-config {path} holds no JSON object", field=_FIELD)
    return values


def check_deepspeed_config(values: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise ConfigError where the configuration says other than the recipe or is not ZeRO-2."""
    stage = values.get("zero_optimization", {}).get("stage")
    if stage != 2:
        raise ConfigError(
            f"zero_optimization.stage is {stage!r} in DeepSpeed's configuration; the engine "
            "deepspeed is ZeRO-2. For less see --engine ddp, for more --engine fsdp2",
            field=f"{_FIELD}.zero_optimization.stage",
        )
    for key in ("offload_optimizer", "offload_param"):
        if values["zero_optimization"].get(key, {}).get("device", "none") not in ("none", "auto"):
            raise ConfigError(
                f"zero_optimization.{key} is set in DeepSpeed's configuration; weights and "
                "moments stay on their device here. Remove the key",
                field=f"{_FIELD}.zero_optimization.{key}",
            )
    if recipe.training.precision == "fp16":
        raise ConfigError(
            "training.precision is fp16, whose loss scale --engine deepspeed does not keep; give "
            "--set training.precision=bf16, or --engine ddp, fsdp2 or zero2",
            field="training.precision",
        )
    for key in _PRECISIONS:
        if values.get(key, {}).get("enabled", False) not in (False, "auto"):
            raise ConfigError(
                f"{key}.enabled is set in DeepSpeed's configuration, and the recipe decides: "
                f"weights stay single, products are {recipe.training.precision} "
                "(training.precision). Remove the key",
                field=f"{_FIELD}.{key}",
            )
    for key, instead in _OTHERS.items():
        if values.get(key) is not None:
            raise ConfigError(
                f"DeepSpeed's configuration has the key {key!r}, and {instead} decides that; "
                "remove the key",
                field=f"{_FIELD}.{key}",
            )
    _check_equals_recipe(values, recipe)


def resolved_deepspeed_config(values: Mapping[str, Any], clip: float | None) -> dict[str, Any]:
    """What DeepSpeed is given; ``clip`` is the largest norm of the gradients.

    The trainer makes the batches and says itself which pass is the last of a step, so that
    DeepSpeed's own count of samples is of no use: it is told one of each.
    """
    kept = {key: value for key, value in values.items() if key not in _PRECISIONS}
    zero = {k: v for k, v in kept["zero_optimization"].items() if v != "auto"}
    kept.pop("train_batch_size", None)
    return {
        **{key: value for key, value in kept.items() if value != "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip or 0.0,
    }


def _check_equals_recipe(values: Mapping[str, Any], recipe: Recipe) -> None:
    of_recipe = {
        "train_batch_size": ("training.batch_size", recipe.training.batch_size),
        "gradient_accumulation_steps": ("training.accumulate", recipe.training.accumulate),
        "gradient_clipping": ("optimizer.gradient_clip", recipe.optimizer.gradient_clip or 0.0),
        "train_micro_batch_size_per_gpu": ("training.batch_size", "auto"),
    }
    for key, (name, wanted) in of_recipe.items():
        value = values.get(key, "auto")
        if value not in ("auto", wanted):
            raise ConfigError(
                f"{key} is {value} in DeepSpeed's configuration, and the recipe's {name} is "
                f'{wanted if wanted != "auto" else recipe.training.batch_size}; write "auto" '
                f"there, or give --set {name}=...",
                field=f"{_FIELD}.{key}",
            )
