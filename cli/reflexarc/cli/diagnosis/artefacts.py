"""A checkpoint or a recipe: whether what it names is here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reflexarc.cli.diagnosis.finding import Finding
from reflexarc.contract.errors import ReflexarcError, install_line

if TYPE_CHECKING:
    from reflexarc.training.config import Recipe


def check_checkpoint(path: Path) -> Finding:
    """Load a checkpoint: every byte, its frozen encoders, the instructions it has embedded."""
    name = "checkpoint"
    try:
        from reflexarc.policy.checkpoint import load_checkpoint

        loaded = load_checkpoint(path)
    except ImportError as error:
        said = f"{path} not loaded: {error}"
        return Finding(name, "broken", said, install_line("server"))
    except ReflexarcError as error:
        return Finding(name, "broken", error.message, _mend_in(error))
    backbones = ", ".join(one.name for one in loaded.policy.frozen_backbones().values())
    instructions = getattr(getattr(loaded.policy, "language", None), "instructions", ())
    said = f"{path}: {loaded.policy.family}, frozen: {backbones or 'nothing'}"
    if loaded.policy.contract.needs_language:
        said += f", {len(instructions)} instructions embedded"
    if loaded.provenance.get("action_heads_trained") is False:
        mend = "train the next stage: its action heads are random"
        return Finding(name, "broken", said, mend)
    return Finding(name, "ok", said)


def check_recipe(name_or_path: str) -> list[Finding]:
    """Read a recipe, each of its stages, and look for the encoders and the data that it names."""
    try:
        from reflexarc.training.recipe_files import load_recipe, recipe_stages

        stages = recipe_stages(name_or_path)
        recipes = [load_recipe(name_or_path, stage=n + 1) for n in range(len(stages))]
        recipe = recipes[0] if recipes else load_recipe(name_or_path)
    except ImportError as error:
        said = f"{name_or_path} not read: {error}"
        return [Finding("recipe", "broken", said, install_line("train"))]
    except ReflexarcError as error:
        return [Finding("recipe", "broken", error.message, _mend_in(error))]
    said = f"{recipe.name}, {recipe.family}" + (f", {len(stages)} stages" if stages else "")
    findings = [Finding("recipe", "ok", said)]
    findings.append(_language(recipe))
    vision = recipe.policy.get("vision")
    if isinstance(vision, dict):
        findings.append(_vision(vision))
    paths = getattr(recipe.data, "paths", ())
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        mend = "give --data PATH, or collect or download it"
        said = f"there is no {', '.join(missing)}"
        findings.append(Finding("recipe's data", "broken", said, mend))
    return findings


def _language(recipe: Recipe) -> Finding:
    name, encoder = "language encoder", recipe.language.encoder
    if encoder == "hashed":
        return Finding(name, "ok", encoder)
    try:
        from reflexarc.policy.backbones.minilm import model_folder
        from reflexarc.training.families import open_table

        table = open_table(recipe)
        if table is not None:
            said = f"{recipe.language.table}: {len(table.instructions)} instructions"
            return Finding(name, "ok", f"{said} by {table.encoder}, {table.dimension} wide")
        return Finding(name, "ok", f"minilm at {model_folder()}")
    except ImportError as error:
        return Finding(name, "broken", str(error), install_line("demo"))
    except ReflexarcError as error:
        mend = install_line("demo") if encoder == "minilm" else _mend_in(error)
        return Finding(name, "broken", error.message, mend)


def _vision(config: dict[str, object]) -> Finding:
    name = "vision encoder"
    try:
        from reflexarc.policy.backbones.vision import VisionBackboneConfig, build_vision_backbone

        identity = build_vision_backbone(VisionBackboneConfig.model_validate(config)).identity
    except ReflexarcError as error:
        return Finding(name, "broken", error.message, _mend_in(error))
    except ImportError as error:
        return Finding(name, "broken", str(error), install_line("server"))
    return Finding(name, "ok", f"{identity.name}, sha256 {identity.sha256[:12]}…")


def _mend_in(error: ReflexarcError) -> str:
    """Named errors end with their mend; only the install line is worth a column of its own."""
    line = error.message.partition("Install it with: ")[2]
    return line or "see the message"
