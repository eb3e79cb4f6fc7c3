"""What a recipe says of the regression of action chunks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from reflexarc.training.config_base import NotNegative, RecipeModel


class ActionChunkConfig(RecipeModel):
    """Weights, noise and sampling of :class:`ActionChunkObjective`.

    Attributes:
        regression: of the continuous dimensions: ``l1``, ``mse``, or ``smooth_l1`` (beta 0.1).
        gripper_loss_weight: of the gripper, beside 1 for every other dimension.
        start_weight, start_steps: weight of the first steps of a chunk.
        transition_weight: of steps at which the gripper's command changes, and of
            ``transition_margin`` steps on either side.
        mask_padding: leave steps past the end of an episode out of the loss.
        noise_std: deviation of the Gaussian noise on video and goal tokens while training.
        noise_scaling: ``norm``: the noise vector of a token is ``noise_std`` as long as the token,
            whatever its width; ``element``: every number gets noise of that deviation, which at
            unit length and 1408 channels is larger than the signal (0.05 gives a cosine of 0.47).
        state_noise: the same on the normalised state.
        static_aug: share of samples that see their newest frame standing still in the place of the
            clip; needs ``policy.static_clips``.
        gripper_oversample: how often an epoch sees each change of the gripper; 1 is once.
        gripper_jitter: the further sights begin up to so many steps before or after it.
        every_step: whether each rendered step is an observation. False leaves out those with less
            than a whole chunk before the end.
    """

    metrics: ClassVar[tuple[str, ...]] = ("action_mae", "action_mse", "total", "motion", "gripper")

    name: Literal["action_chunk"] = "action_chunk"
    regression: Literal["l1", "mse", "smooth_l1"] = "l1"
    gripper_loss_weight: NotNegative = 2.0
    start_weight: NotNegative = 3.0
    start_steps: Annotated[int, Field(ge=0)] = 10
    transition_weight: NotNegative = 5.0
    transition_margin: Annotated[int, Field(ge=0)] = 1
    mask_padding: bool = True
    noise_std: NotNegative = 0.05
    noise_scaling: Literal["norm", "element"] = "norm"
    state_noise: NotNegative = 0.02
    static_aug: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    gripper_oversample: Annotated[float, Field(ge=1.0, le=1000.0)] = 5.0
    gripper_jitter: Annotated[int, Field(ge=0)] = 5
    every_step: bool = True
