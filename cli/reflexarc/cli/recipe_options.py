"""What the commands that take a recipe share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reflexarc.training.config import Recipe

RecipeName = Annotated[str, typer.Argument(help="A packaged recipe's name, or a YAML file.")]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="Demonstration file or folder, instead of the recipe's; repeatable."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one recipe key, such as training.epochs=2; repeatable.",
    ),
]


def with_data(recipe: Recipe, data: list[Path] | None) -> Recipe:
    """``recipe`` on ``data``, where ``--data`` named some."""
    if not data:
        return recipe
    paths = tuple(path.absolute() for path in data)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"paths": paths})})
