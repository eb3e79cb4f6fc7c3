"""``reflexarc train --ablation``: arms of one recipe, trained, evaluated and compared."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reflexarc.cli.child_process import own_command
from reflexarc.cli.demo import free_port, serving
from reflexarc.contract.errors import ConfigError, ReflexarcError

if TYPE_CHECKING:
    from reflexarc.training.ablation import Place

# A launcher's variables would make an arm wait for processes that never come.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")


@dataclass(frozen=True)
class AblationOptions:
    """What the command was given; see ``reflexarc train --help``."""

    name: str
    recipe: str
    arms: tuple[str, ...]
    output: Path
    overrides: tuple[str, ...]
    data: tuple[Path, ...]
    device: str
    threads: int | None
    feature_cache: Path | None
    evaluate: tuple[str, ...]
    tasks: str
    states: str
    dry_run: bool


def run_ablation(options: AblationOptions) -> None:
    """Features once, then every arm, then the simulator, then one comparison.

    Every part resumes: the same command goes on where it was left.
    """
    import torch

    from reflexarc.training.ablation import arm_overrides, find_ablation, places
    from reflexarc.training.recipe_files import load_recipe

    check_alone()
    recipe = load_recipe(options.recipe, options.overrides)
    ablation, arms = find_ablation(options.name, recipe, options.arms)
    group = f"{recipe.name}_{options.name}"
    where = places(arms, torch.cuda.device_count(), options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    for arm in arms:  # a wrong setting is named before hours of work
        load_recipe(options.recipe, [*options.overrides, *arm_overrides(ablation, arm, group)])
    needed = list(ablation.store) if set(arms) != {ablation.reference} else []
    _precompute(options, needed)
    if options.dry_run:
        return
    commands = {arm: _training(options, arm, arm_overrides(ablation, arm, group)) for arm in arms}
    _train(options, commands, dict(zip(arms, where, strict=True)))
    for suite in options.evaluate:
        for arm, place in zip(arms, where, strict=True):
            _evaluate(options, arm, suite, place)
    _report(options, arms, ablation.reference, compact=_compact(recipe.policy))


def _precompute(options: AblationOptions, store: Sequence[str]) -> None:
    arguments = ["data", "precompute", options.recipe, "--device", options.device]
    arguments += ["--feature-cache", str(_cache(options)), *_shared(options), *_set(store)]
    arguments += ["--dry-run"] if options.dry_run else []
    typer.echo("Features of all arms:")
    _run("features", arguments, {}, None)


def _training(options: AblationOptions, arm: str, own: Sequence[str]) -> list[str]:
    return [
        *("train", options.recipe, "--output", str(options.output / arm), "--resume"),
        *("--device", "cpu" if options.device == "cpu" else "auto"),
        *("--feature-cache", str(_cache(options)), *_shared(options), *_set(own)),
    ]


def _train(
    options: AblationOptions, commands: dict[str, list[str]], where: dict[str, Place]
) -> None:
    """All at once where each has a GPU of its own, else one after another."""
    visible = [place.environment.get("CUDA_VISIBLE_DEVICES") for place in where.values()]
    waves: list[list[str]] = []
    for arm, gpu in zip(commands, visible, strict=True):
        free = waves and gpu is not None and all(
            where[other].environment.get("CUDA_VISIBLE_DEVICES") != gpu for other in waves[-1]
        )  # fmt: skip
        if free:
            waves[-1].append(arm)
        else:
            waves.append([arm])
    for wave in waves:
        started = {}
        for arm in wave:
            log = options.output / f"{arm}.log"
            typer.echo(f"Training {arm}: {log}")
            started[arm] = _start(commands[arm], where[arm].environment, log)
        failed = [arm for arm, process in started.items() if process.wait() != 0]
        if failed:
            raise ReflexarcError(
                f"training {', '.join(failed)} failed; look at "
                f"{', '.join(str(options.output / f'{arm}.log') for arm in failed)}, then run the "
                "same command again: what is done is kept"
            )


def _evaluate(options: AblationOptions, arm: str, suite: str, place: Place) -> None:
    results = options.output / "eval" / suite / arm
    log = options.output / f"{arm}_server.log"
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    served = ["--device", options.device, *threads]
    with serving(options.output / arm, free_port(), log, served) as url:
        arguments = ["eval", "libero", "--server", url, "--suite", suite, "--tasks", options.tasks]
        arguments += ["--states", options.states, "--baselines", "none", "--videos", "none"]
        typer.echo(f"Evaluating {arm} on {suite}: {results}")
        _run(
            f"evaluating {arm}",
            [*arguments, "--output", str(results)],
            place.environment,
            options.output / f"{arm}_eval.log",
        )


def _report(
    options: AblationOptions, arms: Sequence[str], reference: str, *, compact: bool
) -> None:
    from reflexarc.cli.ablation_report import write_report

    written = write_report(
        options.output, arms, reference=reference, suites=options.evaluate, compact=compact
    )
    typer.echo((options.output / "ablation.md").read_text())
    typer.echo("Written: " + ", ".join(map(str, written)))


def _compact(policy: object) -> bool:
    """Whether the arms stand in for the full size."""
    semantic = policy.get("semantic") if isinstance(policy, dict) else None
    return isinstance(semantic, dict) and semantic.get("name") == "compact"


def _cache(options: AblationOptions) -> Path:
    return options.feature_cache or options.output / "feature_cache"


def _shared(options: AblationOptions) -> list[str]:
    """Options that every command takes as this one was given them."""
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    data = [part for path in options.data for part in ("--data", str(path))]
    return [*threads, *data, *_set(options.overrides)]


def _set(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _run(what: str, arguments: list[str], environment: Mapping[str, str], log: Path | None) -> None:
    """Run a command of our own to its end; ReflexarcError where it fails."""
    process = _start(arguments, environment, log)
    status = process.wait()
    if status != 0:
        told = "" if log is None else f"; its log is {log}"
        raise ReflexarcError(f"{what} ended with status {status}{told}")


def _start(
    arguments: list[str], environment: Mapping[str, str], log: Path | None
) -> subprocess.Popen[bytes]:
    variables = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    variables |= environment
    sink = None if log is None else log.open("ab")
    try:
        return subprocess.Popen(
            [*own_command(), *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=None if sink is None else subprocess.STDOUT,
        )
    finally:
        if sink is not None:
            sink.close()


def check_alone() -> None:
    """Raise ConfigError under a launcher: the arms are processes of this command's own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--ablation starts a process for each arm itself; run it without torchrun or "
            "accelerate launch",
            field="ablation",
        )
