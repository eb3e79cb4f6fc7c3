"""``reflexarc eval libero``: measure a served policy in the LIBERO simulator."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app
from reflexarc.cli.served import (
    DEFAULT_RETRY_FOR,
    DEFAULT_SERVER,
    RetryFor,
    Seed,
    Server,
    exit_when_unavailable,
    print_wide,
)
from reflexarc.contract.errors import ConfigError

if TYPE_CHECKING:
    from reflexarc.eval.run_settings import RunSettings
    from reflexarc.eval.summary import Summary


MAX_LOCAL_WORKERS = 16


class OtherTask(str, Enum):
    """Whose instruction the arm other_instruction tells."""

    cyclic = "cyclic"
    all = "all"


class Videos(str, Enum):
    """Which episodes are filmed."""

    all = "all"
    failures = "failures"
    none = "none"


class Executor(str, Enum):
    """How chunks are executed."""

    receding_horizon = "receding_horizon"
    temporal_ensembling = "temporal_ensembling"
    asynchronous = "asynchronous"
    real_time_chunking = "real_time_chunking"


@eval_app.command("libero")
def libero(
    server: Server = DEFAULT_SERVER,
    suite: Annotated[
        str,
        typer.Option(
            help="libero_spatial, libero_object, libero_goal, libero_10, libero_90, or a perturbed "
            "one of LIBERO-PRO such as libero_object_swap."
        ),
    ] = "libero_object",
    tasks: Annotated[str, typer.Option(help="Task indices, such as 0,9 or 0-9.")] = "0-9",
    trials: Annotated[
        int, typer.Option(help="Episodes a task and arm: init states 40, 41, ... of 50.")
    ] = 10,
    states: Annotated[
        str | None, typer.Option(help="Init states instead of --trials, such as 40-49.")
    ] = None,
    executor: Annotated[
        Executor, typer.Option(help="How chunks are executed: docs/robots.md.")
    ] = Executor.receding_horizon,
    latency_ms: Annotated[
        float,
        typer.Option(help="Added to every answer, in steps of 50 ms, rounded up.", min=0),
    ] = 0.0,
    replan_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps executed of each chunk; default 8, for temporal_ensembling 1.", min=1
        ),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Of replay,blank,swap_images,other_instruction,other_goal; or none. Default: "
            "replay,blank, without --demonstrations blank."
        ),
    ] = None,
    other_task: Annotated[
        OtherTask,
        typer.Option(
            help="Whose instruction other_instruction tells: the next of --tasks, or each of them."
        ),
    ] = OtherTask.cyclic,
    demonstrations: Annotated[
        Path | None, typer.Option(help="HDF5 file or folder with a demonstration of each task.")
    ] = None,
    goals: Annotated[
        Path | None,
        typer.Option(
            help="For a policy that is shown a goal image: HDF5 file or folder with a "
            "demonstration of each task, whose last image it is."
        ),
    ] = None,
    goal_demo: Annotated[
        str | None, typer.Option(help="Its name, such as demo_0. Default: each task's first.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for results, summary and videos; the same one resumes.")
    ] = Path("outputs/eval"),
    seed: Seed = 0,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps an episode may take; default: the suite's.", min=1)
    ] = None,
    videos: Annotated[Videos, typer.Option(help="Which episodes to film.")] = Videos.failures,
    workers: Annotated[
        int,
        typer.Option(help="Simulator processes, 2 GB each; at most 16 without --ray.", min=1),
    ] = 1,
    retry_for: RetryFor = DEFAULT_RETRY_FOR,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster whose machines run the workers: host:port, or auto for this "
            "machine's. --server must be an address that all of them reach.",
        ),
    ] = None,
) -> None:
    """Success rates beside blind replay and blanked images, on the same initial states.

    Exits with 3 when the server does not answer; the same command then resumes.
    """
    require("reflexarc eval libero", "sim", "libero", "mujoco", "h5py", "scipy", "tqdm", "av")
    _check_workers(workers, ray)
    from reflexarc.eval.run import evaluate
    from reflexarc.eval.run_settings import (
        DEFAULT_REPLAN_STEPS,
        default_states,
        parse_baselines,
        parse_indices,
    )

    settings = run_settings(
        server=server,
        suite=suite,
        tasks=parse_indices(tasks, "--tasks"),
        states=parse_indices(states, "--states") if states else default_states(trials),
        baselines=parse_baselines(baselines or _default_baselines(demonstrations)),
        other_task=other_task.value,
        demonstrations=demonstrations,
        goals=goals,
        goal_demonstration=goal_demo,
        output=output,
        seed=seed,
        executor=executor.value,
        latency_ms=latency_ms,
        replan_steps=replan_steps or DEFAULT_REPLAN_STEPS[executor.value],
        max_steps=max_steps,
        videos=videos.value,
        workers=workers,
        retry_for=retry_for,
        ray=ray,
    )
    with exit_when_unavailable(server, output):
        print_summary(evaluate(settings), output)


def _check_workers(workers: int, ray: str | None) -> None:
    """Raise before anything is loaded."""
    if ray is None and workers > MAX_LOCAL_WORKERS:
        raise ConfigError(
            f"--workers {workers}: this machine runs {MAX_LOCAL_WORKERS} at most; --ray ADDRESS "
            "spreads more over a cluster",
            field="workers",
        )
    if ray is not None:
        require("reflexarc eval libero --ray", "ray", "ray")
        from reflexarc.contract.cluster_address import check_address

        check_address(ray)


def _default_baselines(demonstrations: Path | None) -> str:
    if demonstrations is not None:
        return "replay,blank"
    typer.echo("No --demonstrations: the blind replay of one is left out.", err=True)
    return "blank"


def run_settings(**values: Any) -> RunSettings:
    """The settings of a run; ConfigError naming the option that is out of range."""
    from pydantic import ValidationError

    from reflexarc.eval.run_settings import RunSettings

    try:
        return RunSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(
            f"--{name.replace('_', '-')} {values[name]!r}: {first['msg']}", field=name
        ) from error


def print_summary(summary: Summary, output: Path) -> None:
    """The table, and where the files are."""
    from reflexarc.eval.report_table import rich_table

    print_wide(rich_table(summary))
    typer.echo(f"Results: {output / 'results.jsonl'}, {output / 'summary.md'}")
    if any((output / "videos").glob("*.mp4")):
        typer.echo(f"Videos:  {output / 'videos'}")
