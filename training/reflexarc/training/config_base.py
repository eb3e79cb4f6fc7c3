"""The base of every part of a recipe, and the ranges that several of them use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class RecipeModel(BaseModel):
    """Strict, immutable base: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
