"""What a recipe says of the regression of velocity chunks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from reflexarc.training.config_base import RecipeModel


class VelocityChunkConfig(RecipeModel):
    """The loss of :class:`VelocityChunkObjective`.

    Attributes:
        huber_delta: where the error's square goes over into its size, in normalised units.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss_velocity", "action_mae", "action_mse", "total")

    name: Literal["velocity_chunk"] = "velocity_chunk"
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
