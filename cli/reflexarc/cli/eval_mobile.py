"""``reflexarc eval mobile``: measure a served policy in the small mobile world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reflexarc.cli.evaluate import Executor, OtherTask, Videos, print_summary, run_settings
from reflexarc.cli.extras import require
from reflexarc.cli.groups import eval_app
from reflexarc.cli.served import (
    DEFAULT_RETRY_FOR,
    DEFAULT_SERVER,
    RetryFor,
    Seed,
    Server,
    exit_when_unavailable,
)

_REPLAN_STEPS = 4


@eval_app.command("mobile")
def mobile(
    server: Server = DEFAULT_SERVER,
    tasks: Annotated[str, typer.Option(help="Targets' indices, such as 0,2 or 0-3.")] = "0-3",
    states: Annotated[
        str,
        typer.Option(help="Scenes of each target, such as 0-24: none of them was ever collected."),
    ] = "0-24",
    executor: Annotated[
        Executor, typer.Option(help="How chunks are executed: docs/robots.md.")
    ] = Executor.receding_horizon,
    latency_ms: Annotated[
        float, typer.Option(help="Added to every answer, in control steps, rounded up.", min=0)
    ] = 0.0,
    replan_steps: Annotated[
        int, typer.Option(help="Steps executed of each chunk.", min=1)
    ] = _REPLAN_STEPS,
    baselines: Annotated[
        str,
        typer.Option(help="Of replay,blank,swap_images,other_instruction; or none."),
    ] = "blank,other_instruction",
    other_task: Annotated[
        OtherTask,
        typer.Option(help="Which target other_instruction names: the next one, or each of them."),
    ] = OtherTask.cyclic,
    demonstrations: Annotated[
        Path | None, typer.Option(help="Folder with an episode of each target, for replay.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for results, summary and videos; the same one resumes.")
    ] = Path("outputs/eval_mobile"),
    seed: Seed = 0,
    max_steps: Annotated[int | None, typer.Option(help="Steps an episode may take.", min=1)] = None,
    videos: Annotated[Videos, typer.Option(help="Which episodes to film.")] = Videos.failures,
    workers: Annotated[int, typer.Option(help="Simulator processes.", min=1, max=16)] = 1,
    retry_for: RetryFor = DEFAULT_RETRY_FOR,
) -> None:
    """How often the target that is named is reached, beside controls in the same scenes.

    Exits with 3 when the server does not answer; the same command then resumes.
    """
    require("reflexarc eval mobile", "sim", "mujoco", "h5py", "scipy", "tqdm", "av")
    from reflexarc.eval.run import evaluate
    from reflexarc.eval.run_settings import parse_baselines, parse_indices
    from reflexarc.eval.worlds import MOBILE_SUITE

    settings = run_settings(
        server=server,
        suite=MOBILE_SUITE,
        tasks=parse_indices(tasks, "--tasks"),
        states=parse_indices(states, "--states"),
        baselines=parse_baselines(baselines),
        other_task=other_task.value,
        demonstrations=demonstrations,
        output=output,
        seed=seed,
        executor=executor.value,
        latency_ms=latency_ms,
        replan_steps=replan_steps,
        max_steps=max_steps,
        wait_steps=0,
        videos=videos.value,
        workers=workers,
        retry_for=retry_for,
    )
    with exit_when_unavailable(server, output):
        print_summary(evaluate(settings), output)
