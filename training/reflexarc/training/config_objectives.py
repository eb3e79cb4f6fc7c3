"""What a recipe says of its objective: one model an objective, told apart by ``name``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from reflexarc.training.config_base import NotNegative, Positive, RecipeModel
from reflexarc.training.objectives.action_chunk_config import ActionChunkConfig
from reflexarc.training.objectives.velocity_chunk_config import VelocityChunkConfig

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0)]


class ActionLossConfig(RecipeModel):
    """Loss weights and random draws of the action heads.

    ``state_noise`` is the deviation of the Gaussian noise added to the state, in normalised
    units. ``draws_per_sample`` noise-time pairs share one pass of the encoder.
    """

    flow_weight: NotNegative = 1.0
    gripper_weight: NotNegative = 1.0
    time_density: Literal["beta", "uniform"] = "beta"
    draws_per_sample: Annotated[int, Field(ge=1, le=64)] = 1
    state_noise: NotNegative = 0.02


class FlowMatchingConfig(ActionLossConfig):
    """What :class:`FlowMatchingObjective` trains with: the action heads, and nothing else."""

    # What validation reports; the first chooses ``best`` where the recipe names none.
    metrics: ClassVar[tuple[str, ...]] = (
        "action_mae",
        "action_mse",
        "total",
        "flow",
        "gripper",
    )

    name: Literal["flow_matching"] = "flow_matching"


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


class MaskedJEPAConfig(ActionLossConfig):
    """Masks, predictor, target and weights of :class:`MaskedJEPAObjective`.

    Attributes:
        jepa_weight: of all three terms of the representation.
        action_weight: of flow matching and gripper, each with its own weight.
        action_gradient_into_encoder: whether the action heads train the representation too.
        variance_weight, covariance_weight: of VICReg's terms, beside the prediction's 1.
        masking_strategy: ``modality_aware`` hides whole modalities, ``random`` single tokens,
            ``block`` rectangles of patches; language and state stay visible under ``block``.
        mask_ratio: of ``random``: probability that a token is hidden.
        mask_probabilities: of ``modality_aware``: one for ``language``, ``state`` and each camera.
        max_masked_modalities: of ``modality_aware``; at least one is always hidden.
        blocks: of ``block``: rectangles an image; their union is hidden.
        block_scale: least and largest area of one, as a share of the image.
        block_aspect: least and largest ratio of its height to its width.
        predictor_layers, predictor_width, predictor_d_state: of the predictor's Mamba blocks.
        ema_start, ema_end, ema_schedule: momentum of the target network at the first and the last
            optimiser step, and the way between them; ``constant`` stays at ``ema_start``.
    """

    # ``total`` holds terms against a moving target, so the actions' error chooses ``best``.
    metrics: ClassVar[tuple[str, ...]] = (
        "action_mae",
        "action_mse",
        "total",
        "flow",
        "gripper",
        "prediction",
        "variance",
        "covariance",
        "mse_over_mean",
    )

    name: Literal["masked_jepa"] = "masked_jepa"
    jepa_weight: NotNegative = 1.0
    action_weight: NotNegative = 1.0
    action_gradient_into_encoder: bool = True
    variance_weight: NotNegative = 1.0
    covariance_weight: NotNegative = 0.04
    masking_strategy: Literal["modality_aware", "random", "block"] = "modality_aware"
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    mask_probabilities: dict[str, Probability] = Field(
        default_factory=lambda: {
            "agentview": 0.5,
            "eye_in_hand": 0.5,
            "language": 0.2,
            "state": 0.2,
        }
    )
    max_masked_modalities: Positive = 2
    blocks: Annotated[int, Field(ge=1, le=64)] = 4
    block_scale: tuple[Share, Share] = (0.15, 0.4)
    block_aspect: tuple[Ratio, Ratio] = (0.75, 1.5)
    predictor_layers: Positive = 6
    predictor_width: Annotated[int, Field(ge=8, multiple_of=4)] = 192
    predictor_d_state: Positive = 16
    ema_start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.996
    ema_end: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    ema_schedule: Literal["cosine", "constant"] = "cosine"

    @model_validator(mode="after")
    def _ranges_rise(self) -> MaskedJEPAConfig:
        for name in ("block_scale", "block_aspect"):
            least, largest = getattr(self, name)
            if least > largest:
                raise ValueError(
                    f"{name} goes from {least} down to {largest}; give the lesser first"
                )
        return self


OBJECTIVES: dict[str, type[RecipeModel]] = {
    "flow_matching": FlowMatchingConfig,
    "temporal_jepa": TemporalJEPAConfig,
    "masked_jepa": MaskedJEPAConfig,
    "action_chunk": ActionChunkConfig,
    "velocity_chunk": VelocityChunkConfig,
}
DEFAULT_OBJECTIVE = "flow_matching"


def objective_name(values: object) -> object:
    """The name that tells which objective a map or a config is; ``flow_matching`` by default."""
    if isinstance(values, Mapping):
        return values.get("name", DEFAULT_OBJECTIVE)
    return getattr(values, "name", DEFAULT_OBJECTIVE)


ObjectiveConfig = Annotated[
    Annotated[FlowMatchingConfig, Tag("flow_matching")]
    | Annotated[TemporalJEPAConfig, Tag("temporal_jepa")]
    | Annotated[MaskedJEPAConfig, Tag("masked_jepa")]
    | Annotated[ActionChunkConfig, Tag("action_chunk")]
    | Annotated[VelocityChunkConfig, Tag("velocity_chunk")],
    Discriminator(objective_name),
]
"""One of :data:`OBJECTIVES`."""
