"""Recipes as YAML: packaged by name or given by path, with overrides, and errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.registry import known_families, policy_class
from reflexarc.training.config import Recipe
from reflexarc.training.config_objectives import OBJECTIVES
from reflexarc.training.recipe_stages import (
    select_stage,
    stage_names,
    stage_prefixes,
    without_start,
)

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def packaged_recipes() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    folder = resources.files("reflexarc.training") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    stage: int | None = None,
    from_scratch: bool = False,
) -> Recipe:
    """Read a packaged recipe or a YAML file, apply ``key.path=value`` overrides, validate.

    Args:
        name_or_path: of the recipe.
        overrides: applied after the stage was chosen, so without ``stages`` in their keys.
        stage: number, from 1, of a recipe that holds stages.
        from_scratch: begin a later stage with random weights, nothing frozen.

    Raises:
        ConfigError: no such recipe (nearest names), a key that does not exist (dotted path and
            nearest neighbour), or a value out of range (path and value).
    """
    written = _read_yaml(name_or_path)
    for prefix, of_stage, model in stage_prefixes(written):
        _refuse_unknown_keys(of_stage, model, prefix)
        _validated(of_stage, model, prefix)
    values = select_stage(written, stage)
    for override in overrides:
        _apply_override(values, override)
    recipe = parse_recipe(values)
    return without_start(recipe) if from_scratch else recipe


def recipe_stages(name_or_path: str) -> list[str]:
    """Names of a recipe's stages in order; empty where it holds none."""
    return stage_names(_read_yaml(name_or_path))


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """Validate a recipe's values; see :func:`load_recipe` for the errors."""
    _refuse_unknown_keys(values, Recipe, "")
    recipe = _validated(values, Recipe, "")
    return recipe.model_copy(update={"policy": _complete_policy(recipe)})


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole resolved recipe; :func:`load_recipe` reads it back to an equal one."""
    values = recipe.model_dump(mode="json")
    ordered = {key: values[key] for key in [*Recipe.__annotations__, *values]}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def recipe_differences(first: Recipe, second: Recipe) -> list[str]:
    """Dotted keys whose values differ, each with both values."""
    return value_differences(first.model_dump(mode="json"), second.model_dump(mode="json"))


def value_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Dotted keys of nested maps, and lists of them, whose values differ, each with both values."""
    one, two = _flatten(first, ""), _flatten(second, "")
    return [
        f"{key}: {one.get(key)!r} -> {two.get(key)!r}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
    ]


def _flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for place, one in enumerate(value):
                flat.update(_flatten(one, f"{prefix}{key}[{place}]."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {path}", field="recipe")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} cannot be read as a YAML recipe: {error}", field="recipe"
            ) from error
    else:
        names = packaged_recipes()
        if name_or_path not in names:
            raise ConfigError(
                f"there is no recipe {name_or_path!r}{_nearest(name_or_path, names)} "
                f"Packaged recipes: {', '.join(names)}; or give a path to a YAML file.",
                field="recipe",
            )
        packaged = resources.files("reflexarc.training") / "recipes" / f"{name_or_path}.yaml"
        text = packaged.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path} is not valid YAML: {error}", field="recipe") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name_or_path} must hold a map of keys, got {type(values).__name__}", field="recipe"
        )
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} must be key=value, such as training.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {key}: {text!r} is not a YAML value: {error}", field=key
        ) from error
    if key.split(".")[0] == "stages":
        raise ConfigError(
            f"--set {key}: name the key without its stage; it goes to the one that --stage chooses",
            field=key,
        )
    *parents, leaf = key.split(".")
    target = values
    for depth, parent in enumerate(parents):
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            path = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {key}: {path} holds a value, not keys", field=key)
    target[leaf] = value


def _complete_policy(recipe: Recipe) -> dict[str, Any]:
    """The family's config with every default filled in, as plain values."""
    config_class = _family_config(recipe.family)
    _refuse_unknown_keys(recipe.policy, config_class, "policy.")
    return _validated(recipe.policy, config_class, "policy.").model_dump(mode="json")


def _validated(values: Mapping[str, Any], model: type[AnyModel], prefix: str) -> AnyModel:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, prefix) from error


def _family_config(family: str) -> type[BaseModel]:
    families = known_families()
    if family not in families:
        raise ConfigError(
            f"family: {family!r} is unknown{_nearest(family, families)} "
            f"Known families: {', '.join(families)}.",
            field="family",
        )
    return policy_class(family).config_class


def _refuse_unknown_keys(values: object, model: type[BaseModel], prefix: str) -> None:
    """Raise ConfigError for the first key that ``model`` or a model inside it does not have."""
    if not isinstance(values, Mapping):
        return  # a wrong type is pydantic's to report
    for key, value in values.items():
        if key not in model.model_fields:
            path = f"{prefix}{key}"
            everywhere = _all_keys(Recipe, "")
            elsewhere = [known for known in everywhere if known.endswith(f".{key}")]
            if path in everywhere:  # a key of the same part under another ``name``
                elsewhere = [f"{prefix}name"]
            here = [f"{prefix}{known}" for known in model.model_fields]
            raise ConfigError(
                f"unknown recipe key {path!r}{_nearest(path, here, elsewhere)} "
                f"Known keys{' of ' + prefix[:-1] if prefix else ''}: "
                f"{', '.join(model.model_fields)}.",
                field=path,
            )
        inner = _model_of(model, key, value, prefix)
        if inner is not None:
            _refuse_unknown_keys(value, inner, f"{prefix}{key}.")
            for place, item in enumerate(value if isinstance(value, list | tuple) else ()):
                _refuse_unknown_keys(item, inner, f"{prefix}{key}[{place}].")


def _models_of(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The models that a key may hold: one, several told apart by ``name``, or none."""
    annotation = model.model_fields[key].annotation
    members = get_args(annotation) or (annotation,)
    bare = [get_args(m)[0] if get_origin(m) is Annotated else m for m in members]
    # Python 3.10 takes ``dict[str, str]`` for a type.
    plain = [m for m in bare if get_origin(m) is None]
    return [m for m in plain if isinstance(m, type) and issubclass(m, BaseModel)]


def _model_of(
    model: type[BaseModel], key: str, value: object, prefix: str
) -> type[BaseModel] | None:
    """The model that ``value`` is to be read as; ConfigError for a ``name`` that none has."""
    models = _models_of(model, key)
    if len(models) < 2:
        return models[0] if models else None
    named = {member.model_fields["name"].default: member for member in models}
    name = value.get("name", next(iter(named))) if isinstance(value, Mapping) else None
    if name is None:
        return None  # a wrong type is pydantic's to report
    if name not in named:
        raise ConfigError(
            f"{prefix}{key}.name: {name!r} is unknown{_nearest(str(name), named)} "
            f"Known: {', '.join(named)}.",
            field=f"{prefix}{key}.name",
        )
    return named[name]


def _all_keys(model: type[BaseModel], prefix: str) -> list[str]:
    """Dotted paths of every key of a model and of the models inside it."""
    keys = []
    for key in model.model_fields:
        keys.append(f"{prefix}{key}")
        for inner in _models_of(model, key):
            keys.extend(_all_keys(inner, f"{prefix}{key}."))
    return list(dict.fromkeys(keys))


def _nearest(name: str, known: Iterable[str], preferred: Sequence[str] = ()) -> str:
    """``; did you mean ...?`` with the closest names, or a full stop where none is close."""
    matches = [*preferred, *difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)][:3]
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else "."


def _config_error(error: ValidationError, prefix: str) -> ConfigError:
    details = []
    first = ""
    for item in error.errors():
        # A union's error has the member's tag in its path, which is no key of the recipe.
        parts = [
            str(part)
            for place, part in enumerate(item["loc"])
            if not (place and item["loc"][place - 1] == "objective" and part in OBJECTIVES)
        ]
        path = prefix + ".".join(parts)
        first = first or path
        said = item["msg"].removeprefix("Value error, ")
        # A check of several keys at once says itself what it got.
        has_input = item["type"] not in ("missing", "value_error")
        came = f" (got {item['input']!r})" if has_input else ""
        details.append(f"{path.rstrip('.')}: {said}{came}")
    return ConfigError("the recipe is wrong: " + "; ".join(details), field=first)
