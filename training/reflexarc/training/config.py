"""Recipes: everything that decides a training run, as strict pydantic models.

A recipe is data (YAML). What it leaves out takes the default written here; a key that is not
here is an error (:mod:`reflexarc.training.recipe_files`). The whole resolved recipe is written
into the run's folder and into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from reflexarc.contract.policy_contract import (
    LIBERO_STATES,
    History,
    NormalizationMode,
    Orientation,
)
from reflexarc.training.config_base import (
    Fraction,
    NotNegative,
    Positive,
    RecipeModel,
)
from reflexarc.training.config_data import DataConfig
from reflexarc.training.config_objectives import FlowMatchingConfig, ObjectiveConfig
from reflexarc.training.config_reporting import ReportingConfig


class ContractConfig(RecipeModel):
    """The parts of the policy's contract that a recipe chooses; the data decides the rest.

    ``source_size`` is the side of the recorded images in pixels; None takes what the data has.
    ``state_layout`` chooses among the states of LIBERO's data; other data has the one that
    ``data.state`` makes. ``orientation`` is ``upright`` for cameras that stand as they should.
    ``needs_language`` and ``needs_goal_image`` say how an episode's task is told.
    """

    cameras: tuple[str, ...] = ("agentview", "eye_in_hand")
    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    source_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    orientation: Orientation = "rotated_180"
    state_layout: str = "eef3+axisangle3+fingers2"
    horizon: Annotated[int, Field(ge=1, le=1024)] = 10
    history: History = History()
    needs_language: bool = True
    needs_goal_image: bool = False
    state_normalization: NormalizationMode = "mean_std"
    action_normalization: NormalizationMode = "mean_std"

    @model_validator(mode="after")
    def _layout_is_known(self) -> ContractConfig:
        if self.state_layout not in LIBERO_STATES:
            raise ValueError(
                f"state_layout {self.state_layout!r} is unknown; known: {sorted(LIBERO_STATES)}"
            )
        return self


class LanguageConfig(RecipeModel):
    """What embeds instructions: ``minilm`` (pretrained, offline), ``hashed`` (smoke runs), or a
    ``table``: the folder that ``reflexarc data embed-language`` wrote, by any text model.
    """

    encoder: Literal["minilm", "hashed", "table"] = "minilm"
    table: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_table_is_an_encoder(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("table") is not None:
            return {"encoder": "table", **values}
        return values

    @model_validator(mode="after")
    def _one_of_table_and_encoder(self) -> LanguageConfig:
        if (self.encoder == "table") != (self.table is not None):
            raise ValueError(
                f"encoder is {self.encoder!r} and table is {str(self.table)!r}; give one of them: "
                '--set "language={encoder: minilm}" or --set "language={table: DIR}"'
            )
        return self


class OptimizerConfig(RecipeModel):
    """AdamW. Norms, biases, embeddings, ``A_log`` and ``D`` never decay."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NotNegative = 0.01
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0


class ScheduleConfig(RecipeModel):
    """Learning rate over the run: a warm-up, then a cosine.

    ``cosine`` warms up linearly over ``warmup_steps``, or where that is null over
    ``warmup_fraction`` of the run, and falls to ``final_fraction`` of the peak. ``one_cycle`` rises
    by a cosine over ``warmup_fraction`` of the run from 1/25 of the peak, and falls likewise.
    """

    name: Literal["cosine", "one_cycle", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = 100
    warmup_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


class LoopConfig(RecipeModel):
    """Length of the run, batches, and what happens every so often.

    Exactly one of ``epochs`` and ``steps``. ``validate_every`` counts epochs when the run is
    given in epochs, else optimiser steps, and so do ``checkpoint_every`` and ``keep_every``. With
    ``ema_decay`` the averaged weights are validated and served. ``best_metric`` is one that the
    objective reports on held-out episodes, by default the objective's own choice; less is better.
    ``last``, the best ``keep_best`` checkpoints by it, and those of every ``keep_every`` are kept.

    ``batch_size`` is that of an optimiser step, over all processes and passes: ``accumulate``
    computes it in so many passes, each with that part of the memory. What carries a mean over all
    rows is not changed by it; statistics of a batch (VICReg's) are those of a pass.
    ``activation_checkpointing`` computes each block of the policy anew in the backward pass
    instead of keeping what it held. ``loader_workers`` threads read batches ahead; their number
    changes no batch.
    """

    batch_size: Positive = 64
    accumulate: Positive = 1
    epochs: Positive | None = None
    steps: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    loader_workers: Annotated[int, Field(ge=0, le=256)] = 0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    log_every: Positive = 20
    validate_every: Positive = 1
    checkpoint_every: Positive = 1
    keep_best: Positive = 1
    keep_every: Positive | None = None
    best_metric: str | None = None
    sampling_steps: Positive | None = None

    @model_validator(mode="after")
    def _one_length(self) -> LoopConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"give exactly one of epochs and steps, got epochs={self.epochs} and "
                f"steps={self.steps}; clear one with --set training.epochs=null, or steps=null"
            )
        return self


class StageInfo(RecipeModel):
    """Which of a recipe's stages a resolved recipe is.

    ``number`` counts from 1, ``names`` are those of all stages. ``from_scratch`` says that a
    later stage started from random weights on purpose.
    """

    number: Positive
    names: tuple[str, ...]
    from_scratch: bool = False

    @property
    def name(self) -> str:
        return self.names[self.number - 1]


class Trained(RecipeModel):
    """What one stage trains, and how.

    ``freeze`` names modules of the policy (``representation``) that keep the weights they start
    with; ``learning_rate_scale`` gives a module's factor of the learning rate.
    """

    objective: ObjectiveConfig = FlowMatchingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: LoopConfig
    freeze: tuple[str, ...] = ()
    learning_rate_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _best_metric_is_reported(self) -> Trained:
        chosen, known = self.training.best_metric, self.objective.metrics
        if chosen is not None and chosen not in known:
            raise ValueError(
                f"training.best_metric {chosen!r} is none of what {self.objective.name} reports: "
                f"{', '.join(known)}"
            )
        return self

    @property
    def best_metric(self) -> str:
        """The held-out metric that chooses ``best``."""
        return self.training.best_metric or self.objective.metrics[0]


class Stage(Trained):
    """One of the ``stages`` of a recipe's file."""

    name: str


class Recipe(Trained):
    """One training run. ``policy`` holds the family's own architecture config.

    A recipe's file may hold ``stages`` in the place of what :class:`Trained` lists; a recipe is
    always one of them (:func:`reflexarc.training.recipe_files.load_recipe`).
    """

    name: str
    description: str = ""
    family: str
    stage: StageInfo | None = None
    policy: dict[str, Any] = Field(default_factory=dict)
    language: LanguageConfig = LanguageConfig()
    contract: ContractConfig = ContractConfig()
    data: DataConfig = DataConfig()
    reporting: ReportingConfig = ReportingConfig()
