"""The base of every part of a recipe, and the ranges that several of them use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
FeatureDtype = Literal["fp16", "bf16", "fp32"]
"""How the feature store keeps what is not pixels."""


class RecipeModel(BaseModel):
    """Strict, immutable base: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
