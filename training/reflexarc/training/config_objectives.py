"""What a recipe says of its objective: one model an objective, told apart by ``name``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from reflexarc.training.config_base import NotNegative, Positive, RecipeModel


class FlowMatchingConfig(RecipeModel):
    """Loss weights and random draws of :class:`FlowMatchingObjective`.

    ``state_noise`` is the deviation of the Gaussian noise added to the state, in normalised
    units. ``draws_per_sample`` noise-time pairs share one pass of the encoder.
    """

    # What validation reports; the first chooses ``best`` where the recipe names none.
    metrics: ClassVar[tuple[str, ...]] = (
        "action_mae",
        "action_mse",
        "total",
        "flow",
        "gripper",
    )

    name: Literal["flow_matching"] = "flow_matching"
    flow_weight: NotNegative = 1.0
    gripper_weight: NotNegative = 1.0
    time_density: Literal["beta", "uniform"] = "beta"
    draws_per_sample: Annotated[int, Field(ge=1, le=64)] = 1
    state_noise: NotNegative = 0.02


class TemporalJEPAConfig(RecipeModel):
    """Prediction of the representation ``horizon`` control steps ahead, given the actions.

    The target network's momentum rises from ``ema_start`` to ``ema_end`` by a cosine over the
    run's optimiser steps. ``variance_weight`` and ``covariance_weight`` are VICReg's.
    """

    metrics: ClassVar[tuple[str, ...]] = ("total",)

    name: Literal["temporal_jepa"] = "temporal_jepa"
    horizon: Positive = 1
    variance_weight: NotNegative = 1.0
    covariance_weight: NotNegative = 0.04
    ema_start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.996
    ema_end: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    predictor_hidden: Positive = 512


OBJECTIVES: dict[str, type[RecipeModel]] = {
    "flow_matching": FlowMatchingConfig,
    "temporal_jepa": TemporalJEPAConfig,
}
DEFAULT_OBJECTIVE = "flow_matching"


def objective_name(values: object) -> object:
    """The name that tells which objective a map or a config is; ``flow_matching`` by default."""
    if isinstance(values, Mapping):
        return values.get("name", DEFAULT_OBJECTIVE)
    return getattr(values, "name", DEFAULT_OBJECTIVE)


ObjectiveConfig = Annotated[
    Annotated[FlowMatchingConfig, Tag("flow_matching")]
    | Annotated[TemporalJEPAConfig, Tag("temporal_jepa")],
    Discriminator(objective_name),
]
"""One of :data:`OBJECTIVES`."""
