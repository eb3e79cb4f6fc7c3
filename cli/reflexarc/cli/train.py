"""``reflexarc train``: train a policy by a recipe."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.recipe_options import Data, Overrides, RecipeName, with_data
from reflexarc.contract.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    recipe: RecipeName,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run: checkpoints and metrics; default: "
            "runs/<name>_s<seed>_<time in UTC>."
        ),
    ] = None,
    data: Data = None,
    set_: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would cost, and stop.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that stands in --output.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove the run that stands in --output.")
    ] = False,
    stage: Annotated[
        int | None, typer.Option(min=1, help="Which of the recipe's stages, counted from 1.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Run or checkpoint of the stage before, to start from its weights."),
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch", help="Start a later stage from random weights; freeze nothing."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores by default.")
    ] = None,
    feature_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of frame features; default: feature_cache beside --output."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="Of several processes: auto, ddp, fsdp2, zero2 or deepspeed."),
    ] = "auto",
    deepspeed_config: Annotated[
        Path | None,
        typer.Option(help="JSON file for --engine deepspeed, instead of the packaged one."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: estimate for so many processes."),
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(help="Train arms that differ in one key, and compare them: geometry."),
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="With --ablation: which, such as none,pool,qformer.")
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(help="With --ablation: suites to drive each arm in, such as libero_spatial."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="With --evaluate: task indices.")] = "0-9",
    states: Annotated[str, typer.Option(help="With --evaluate: initial states.")] = "40-49",
) -> None:
    """Train a policy; the last and the best checkpoint stand in the run's folder."""
    require("reflexarc train", "train", "torch", "h5py", "yaml", "safetensors", "tqdm")
    from rich.console import Console

    from reflexarc.cli.train_ablation import AblationOptions, run_ablation
    from reflexarc.policy.memory import keep_freed_memory
    from reflexarc.training.distributed.launch import check_recipe, join_processes
    from reflexarc.training.recipe_files import load_recipe
    from reflexarc.training.report import plan_table, summary_table
    from reflexarc.training.run_folder import RunFolder, exclusive
    from reflexarc.training.session import (
        check_run_folder,
        check_space,
        check_start,
        execute,
        open_run_folder,
        plan,
        use_threads,
    )
    from reflexarc.training.trained_modules import module_table

    if resume and fresh:
        raise ConfigError("give --resume or --fresh, not both")
    if ablation is None and (arms or evaluate):
        raise ConfigError("--arms and --evaluate belong to --ablation", field="ablation")
    if ablation is not None:
        if fresh or stage is not None or init_from is not None or from_scratch or processes:
            raise ConfigError(
                "--ablation goes on where it was left, in folders of its own: it takes no --fresh, "
                "--stage, --init-from, --from-scratch or --processes",
                field="ablation",
            )
        run_ablation(
            AblationOptions(
                name=ablation,
                recipe=recipe,
                arms=tuple(_listed(arms)),
                output=output or Path("runs") / f"{Path(recipe).stem}_{ablation}",
                overrides=tuple(set_ or ()),
                data=tuple(data or ()),
                device=device,
                threads=threads,
                feature_cache=feature_cache,
                evaluate=tuple(_listed(evaluate)),
                tasks=tasks,
                states=states,
                dry_run=dry_run,
            )
        )
        return
    keep_freed_memory()
    if processes is not None and not dry_run:
        raise ConfigError(
            "--processes is for --dry-run; torchrun starts several", field="processes"
        )
    # A plan for several is made by one, whatever the engine.
    joined = join_processes(
        "auto" if processes else engine,
        device,
        deepspeed_config=None if processes else deepspeed_config,
    )
    use_threads(threads)
    console = Console(quiet=not joined.is_first)
    loaded = load_recipe(recipe, set_ or [], stage=stage, from_scratch=from_scratch)
    check_recipe(joined, loaded)
    loaded = with_data(loaded, data)
    output = output or _own_folder(loaded.name, loaded.training.seed, resume=resume)
    if not dry_run:
        check_run_folder(loaded, output, resume=resume, fresh=fresh)
        check_start(loaded, recipe, output, init_from=init_from, resume=resume)
    planned = plan(
        loaded,
        output,
        device=joined.device,
        feature_cache=feature_cache,
        init_from=init_from,
        engine=_planned(engine) if processes else joined.name,
        world=processes or joined.world,
        timed=dry_run,
    )
    console.print(plan_table(planned.preparation, planned.estimate))
    if dry_run:
        prepared = planned.preparation
        console.print(module_table(loaded, prepared.policy, prepared.objective))
        return
    check_space(planned)  # before --fresh removes anything
    joined.wait()  # until all have looked at what stood there
    with exclusive(output) if joined.is_first else nullcontext():
        if joined.is_first:
            open_run_folder(loaded, output, resume=resume, fresh=fresh)
        joined.wait()
        outcome = execute(planned, RunFolder(output), log=console.print, engine=joined)
    joined.close()
    console.print(summary_table(outcome, output))
    if outcome.stopped_by is not None:
        console.print(
            f"Stopped by {outcome.stopped_by.name}; `last` is saved. Continue with the same "
            "command and --resume."
        )
        raise typer.Exit(128 + outcome.stopped_by.value)


def _listed(names: str | None) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _planned(engine: str) -> str:
    """The engine of processes that are only planned."""
    from reflexarc.training.distributed.launch import ENGINES

    if engine not in ENGINES:
        raise ConfigError(
            f"--engine is {engine!r}; it is one of {', '.join(ENGINES)}", field="engine"
        )
    return "ddp" if engine == "auto" else engine


def _own_folder(name: str, seed: int, *, resume: bool) -> Path:
    """The folder of a run that was given none."""
    from reflexarc.training.runs.naming import RUNS, new_run_folder, newest_run

    if resume:
        newest = newest_run(name, seed)
        which = "the run's folder" if newest is None else f"the run's folder, such as {newest}"
        raise ConfigError(f"--resume needs --output: name {which}", field="output")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process would look at its own clock.
        raise ConfigError(
            f"several processes train one run: give them one --output, such as {RUNS / name}",
            field="output",
        )
    return new_run_folder(name, seed)
