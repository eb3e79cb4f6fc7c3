"""One whole training run, as ``reflexarc train`` starts it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.threads import usable_cores
from reflexarc.training.config import Recipe
from reflexarc.training.distributed import Engine
from reflexarc.training.distributed.launch import processes_here, threads_of_each
from reflexarc.training.distributed.processes import naming_a_lost_process
from reflexarc.training.estimate import Estimate, check_disk, estimate
from reflexarc.training.feature_store.holding import hold_features
from reflexarc.training.outcome import Outcome, summary_of
from reflexarc.training.precision import check_precision, precision_on
from reflexarc.training.preparation import Preparation, prepare
from reflexarc.training.recipe_files import load_recipe, recipe_differences, recipe_to_yaml
from reflexarc.training.reporting import Reporters, open_reporters, told_in_log
from reflexarc.training.run_folder import RunFolder, write_text
from reflexarc.training.scans import other_scan
from reflexarc.training.starting_weights import check_stage, open_start, required_start
from reflexarc.training.trainer import Trainer


@dataclass(frozen=True)
class Planned:
    """A run that is ready to start: what it needs and what it will cost."""

    preparation: Preparation
    estimate: Estimate
    output: Path
    feature_cache: Path
    device: torch.device


def plan(
    recipe: Recipe,
    output: Path,
    *,
    device: torch.device,
    feature_cache: Path | None = None,
    init_from: Path | None = None,
    engine: str = "single",
    world: int = 1,
    timed: bool = False,
) -> Planned:
    """Open the data, build the policy, and estimate the cost; writes nothing.

    ``init_from`` is the run or the checkpoint that a later stage takes its weights from. Without
    it they are random: enough for a plan, and for a run that has checkpoints of its own.
    ``engine``, ``world`` and ``timed`` are for the estimate, see there.
    """
    precision, notice = precision_on(recipe.training.precision, device)
    loop = recipe.training.model_copy(update={"precision": precision})
    recipe = recipe.model_copy(update={"training": loop})
    check_precision(precision, device)
    cache = feature_cache or output.absolute().parent / "feature_cache"
    start = None
    if init_from is not None:
        start = open_start(init_from)
        check_stage(recipe, start)
    preparation = replace(prepare(recipe, device, start=start), feature_cache=cache)
    if notice is not None:
        preparation = replace(preparation, remarks=(notice, *preparation.remarks))
    found = estimate(preparation, output, cache, engine=engine, world=world, timed=timed)
    return Planned(preparation, found, output, cache, device)


def check_start(
    recipe: Recipe, shown_name: str, output: Path, *, init_from: Path | None, resume: bool
) -> None:
    """Raise ConfigError when a later stage has no weights to start from, or another has some.

    Args:
        recipe: of one stage.
        shown_name: how the user named it, for the command in the message.
        output: a run that is resumed has its own weights.
        init_from, resume: as given.
    """
    stage = recipe.stage
    if stage is None or stage.number == 1 or stage.from_scratch:
        if init_from is not None:
            raise ConfigError(
                "--init-from is for a stage that starts from the one before; "
                + ("leave out either it or --from-scratch"
                   if stage is not None and stage.from_scratch
                   else f"{recipe.name} starts here from random weights"),
                field="init_from",
            )  # fmt: skip
        return
    resumes = resume and RunFolder(output).pointed("last") is not None
    if init_from is None and not resumes:
        raise required_start(recipe, shown_name)


def check_run_folder(recipe: Recipe, output: Path, *, resume: bool, fresh: bool) -> None:
    """Raise ConfigError when the run cannot be written to ``output``.

    That is when a run stands there and neither ``resume`` nor ``fresh`` is given, or when the
    run to be resumed has another recipe (naming the keys).
    """
    run = RunFolder(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; name a folder", field="output")
    if not run.has_run() or fresh:
        return
    if not resume:
        raise ConfigError(
            f"{output} already holds a training run; continue it with --resume, or start "
            "over with --fresh, which removes its checkpoints",
            field="output",
        )
    if run.recipe.is_file():
        _refuse_other_recipe(load_recipe(str(run.recipe)), recipe, output)


def check_space(planned: Planned) -> None:
    """Raise ConfigError when the run would not fit on the disk."""
    check_disk(planned.estimate, planned.output)


def open_run_folder(recipe: Recipe, output: Path, *, resume: bool, fresh: bool) -> RunFolder:
    """The run's folder, ready to train in; see :func:`check_run_folder` for the errors.

    Whoever shares the folder with other processes holds :func:`exclusive` around this and the run.
    """
    check_run_folder(recipe, output, resume=resume, fresh=fresh)
    run = RunFolder(output)
    if fresh:
        run.clear()
    run.path.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe, recipe_to_yaml(recipe))
    return run


def execute(
    planned: Planned,
    run: RunFolder,
    *,
    progress_bar: bool = True,
    log: Callable[[str], None] = lambda line: None,
    engine: Engine | None = None,
) -> Outcome:
    """Compute features, train, and write ``summary.json`` when the run is complete.

    ``log`` is told what is worth a line. The processes of an ``engine`` all call this; they share
    features and steps, and the first alone writes into ``run``.
    """
    engine = engine or Engine(planned.device)
    preparation = planned.preparation
    features = preparation.features(
        planned.feature_cache, progress=progress_bar and engine.is_first
    )
    engine.wait()
    if engine.world > 1:
        log(f"{engine.world} processes, engine {engine.name}")
    memory = preparation.recipe.data.feature_memory_mib
    held = hold_features(
        features.arrays,
        planned.device,
        processes=processes_here(),
        limit=memory and memory * 2**20,
    )
    for remark in preparation.remarks:
        log(remark)
    if features.remark:
        log(f"features computed anew: {features.remark}")
    log(
        f"frame features: {features.found:,} of {features.needed:,} rows found in "
        f"{features.path}; {features.bytes / 2**20:,.1f} MiB, {held.place}"
    )
    train, held_out = preparation.sources(held.rows, features.first_rows)
    trainer = Trainer(
        preparation.recipe,
        preparation.policy,
        preparation.objective,
        train,
        held_out,
        preparation.processor,
        preparation.statistics,
        preparation.provenance(),
        run,
        progress_bar=progress_bar,
        engine=engine,
    )
    resumed = trainer.resume()
    at = trainer.progress.step
    reports = engine.is_first and at < trainer.total_steps
    with closing(
        open_reporters(run, preparation.recipe, step=at) if reports else Reporters()
    ) as reporter:
        if resumed:
            log(f"resuming at step {at}")
            last = run.pointed("last")
            changed = None if last is None else other_scan(last, preparation.scan)
            if changed is not None:
                log(changed)
        with (
            told_in_log(reporter, preparation.recipe.name, at, trainer.total_steps),
            naming_a_lost_process(engine),
        ):
            outcome = trainer.train(reporter)
            ended = "complete" if outcome.stopped_by is None else outcome.stopped_by.name
            reporter.message(f"{ended} at step {outcome.progress.step}")
    for line in held.statistics():
        log(line)
    # A run that was complete before is left as it stands.
    if (
        engine.is_first
        and outcome.stopped_by is None
        and not (outcome.steps_run == 0 and run.summary.is_file())
    ):
        write_text(run.summary, json.dumps(summary_of(outcome), indent=2))
    return outcome


def use_threads(count: int | None) -> int:
    """Let torch compute on ``count`` threads; None takes every core this process may use.

    The processes of one run on this machine share the cores.
    """
    if count is None:
        count = threads_of_each(usable_cores())
    torch.set_num_threads(count)
    return count


def _refuse_other_recipe(before: Recipe, now: Recipe, output: Path) -> None:
    # The files may have moved; that they are the same is checked by their fingerprint, and the
    # instructions' embeddings by themselves. What a run reports and keeps may change on the way.
    free = (
        "data.paths:",
        "language.table:",
        "reporting.",
        "training.keep_best:",
        "training.keep_every:",
        "training.loader_workers:",
        "data.feature_memory_mib:",
    )
    differences = [
        d
        for d in recipe_differences(before, now)
        if not d.startswith(free) and not re.match(r"data\.sources\[\d+\]\.path:", d)
    ]
    if differences:
        raise ConfigError(
            f"{output} was trained by another recipe, so it cannot be resumed by this one: "
            f"{'; '.join(differences[:8])}. Give the same recipe, or --fresh",
            field=differences[0].partition(":")[0],
        )
