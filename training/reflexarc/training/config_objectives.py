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
    """Weights, horizon and target of :class:`TemporalJEPAObjective`.

    Attributes:
        horizon: control steps from the window to the one whose representation is predicted. At
            20 Hz one step changes so little that copying z is nearly right; a longer horizon asks
            for more.
        prediction_weight: of the mean squared error of normed representations.
        variance_weight, covariance_weight: of VICReg's terms on the predicted representation.
        ema_start, ema_end: momentum of the target network at the first and at the last optimiser
            step, a cosine between them; at 1 the target stands still.
        predictor_hidden: width of the temporal predictor.
        state_noise: deviation of the Gaussian noise added to the state that the trained branch
            sees, in normalised units; the target's stays clean.
    """

    # What may choose ``best``: less is better. The target moves, so ``total`` of different steps
    # compares only roughly; the last checkpoint is what a second stage usually starts from.
    metrics: ClassVar[tuple[str, ...]] = (
        "total",
        "prediction",
        "variance",
        "covariance",
        "mse_over_identity",
    )

    name: Literal["temporal_jepa"] = "temporal_jepa"
    horizon: Annotated[int, Field(ge=1, le=1024)] = 1
    prediction_weight: NotNegative = 1.0
    variance_weight: NotNegative = 1.0
    covariance_weight: NotNegative = 0.04
    ema_start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.996
    ema_end: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    predictor_hidden: Positive = 512
    state_noise: NotNegative = 0.0


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
