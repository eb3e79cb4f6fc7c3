"""The ``data`` section of the recipe that a policy was trained by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflexarc.cli.extras import require
from reflexarc.contract.errors import ConfigError


def read_recipe_data(path: Path) -> dict[str, Any]:
    """From a YAML file, a run's folder (its ``recipe.yaml``) or a checkpoint's (``policy.json``).

    ConfigError for a path that holds no recipe.
    """
    if path.is_dir():
        path = path / "policy.json" if (path / "policy.json").is_file() else path / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            recipe = json.loads(text)["provenance"]["recipe"]
        else:
            require("--recipe", "train", "yaml")
            import yaml

            recipe = yaml.safe_load(text)
        return dict(recipe.get("data") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_recipe(path, error) from error
    except Exception as error:  # yaml's own, which is known only where yaml is
        if type(error).__module__.startswith("yaml"):
            raise _no_recipe(path, error) from error
        raise


def _no_recipe(path: Path, error: BaseException) -> ConfigError:
    reason = str(error).partition("\n")[0]
    return ConfigError(
        f"--recipe {path} holds no recipe ({type(error).__name__}: {reason}); name a run's "
        "folder, a checkpoint's, or a recipe.yaml",
        field="recipe",
    )
