"""Where a run is reported beside its own folder; decides nothing about what is trained."""

from __future__ import annotations

from reflexarc.training.config_base import RecipeModel


class ReportingConfig(RecipeModel):
    """TensorBoard and Weights & Biases.

    Attributes:
        tensorboard: None writes events where tensorboard is installed, true insists on it.
        wandb: None reports there when ``WANDB_API_KEY`` is set, true insists on it, and then
            ``WANDB_MODE=offline`` or an earlier ``wandb login`` serves as well as a key.
        project, group: of the run on Weights & Biases.
    """

    tensorboard: bool | None = None
    wandb: bool | None = None
    project: str = "reflexarc"
    group: str | None = None
