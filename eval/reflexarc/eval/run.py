"""A whole evaluation: plan, resume, run in one or several processes, summarise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from reflexarc.client import PolicyClient
from reflexarc.contract import PolicyContract
from reflexarc.contract.errors import ConfigError
from reflexarc.eval.arms import ARMS, Arm
from reflexarc.eval.baselines import Demonstration
from reflexarc.eval.goal_images import Goal, load_goals
from reflexarc.eval.report_html import write_report_if_possible
from reflexarc.eval.results import EpisodeKey, EpisodeResult, ResultsLog
from reflexarc.eval.run_settings import RunSettings
from reflexarc.eval.runner import EpisodeRunner, RunPlan
from reflexarc.eval.summary import Summary, summarize, write_summary
from reflexarc.eval.workers import run_in_processes
from reflexarc.eval.worlds import world_of

Notify = Callable[[str], None]


def evaluate(settings: RunSettings, notify: Notify = tqdm.write) -> Summary:
    """Run what is not finished yet in ``settings.output`` and summarise what was asked for.

    Writes ``results.jsonl``, ``videos/*.mp4``, ``summary.json``, ``summary.md`` and
    ``report.html``.

    Raises:
        ServerUnavailableError: the server stayed silent for ``settings.retry_for`` seconds; what
            was finished is kept, and the same call resumes.
        ContractViolationError, ResultsError, SimulatorError, DatasetError, ConfigError: see there.
    """
    tasks = world_of(settings.suite).select_tasks(settings.suite, settings.tasks)
    _check_other_tasks(settings)
    plan = _plan(settings, tasks, _load_demonstrations(settings, tasks))
    with ResultsLog(settings.output, plan.identity, notify) as log:
        finished, asked = log.finished, settings.all_episodes()
        try:
            _run(plan, [key for key in asked if key not in finished], log, notify)
        finally:
            results = [result for result in log.results if result.key in set(asked)]
            summary = summarize(results, settings, plan.identity)
            write_summary(summary, settings.output)
    write_report_if_possible(settings.output, notify)
    return summary


def _plan(
    settings: RunSettings, tasks: Sequence[Any], demonstrations: dict[int, Demonstration]
) -> RunPlan:
    """Ask the server for its contract, and check that the world and the arms can meet it."""
    with PolicyClient(settings.server, retry_for=settings.retry_for) as client:
        contract = client.contract
    world_of(settings.suite).check_contract(contract)
    _check_contract(settings, contract)
    goals: Mapping[int, Goal] = {}
    if settings.goals is not None:
        goals = load_goals(contract, settings.goals, tasks, settings.goal_demonstration)
    sha256 = {index: demonstration.sha256 for index, demonstration in demonstrations.items()}
    shown = {index: goal.sha256 for index, goal in goals.items()}
    return RunPlan(
        settings=settings,
        identity=settings.identity(contract, sha256, shown),
        contract=contract,
        tasks={task.index: task for task in tasks},
        demonstrations=demonstrations,
        goals=goals,
    )


def _load_demonstrations(settings: RunSettings, tasks: Sequence[Any]) -> dict[int, Demonstration]:
    needing = [arm for arm in settings.arms if ARMS[arm].needs_demonstrations]
    if not needing:
        return {}
    if settings.demonstrations is None:
        raise ConfigError(
            f"{_named(needing)} a demonstration of each task: give --demonstrations, or leave "
            f"{_them(needing)} out with --baselines {_without(settings, needing)}",
            field="demonstrations",
        )
    world, path = world_of(settings.suite), settings.demonstrations
    return {task.index: world.demonstration(path, task) for task in tasks}


def _check_other_tasks(settings: RunSettings) -> None:
    needing = [arm for arm in settings.arms if ARMS[arm].involves_other_task]
    if needing and len(settings.tasks) < 2:
        raise ConfigError(
            f"{_named(needing)} another task beside {settings.tasks[0]}: select at least two with "
            f"--tasks, or leave {_them(needing)} out with --baselines "
            f"{_without(settings, needing)}",
            field="tasks",
        )


def _check_contract(settings: RunSettings, contract: PolicyContract) -> None:
    if settings.replan_steps > contract.action.horizon:
        raise ConfigError(
            f"--replan-steps {settings.replan_steps} is more than the policy's chunk of "
            f"{contract.action.horizon} actions",
            field="replan_steps",
        )
    if contract.needs_goal_image and settings.goals is None:
        raise ConfigError(
            f"this policy ({contract.family}) is shown a goal image: name demonstrations whose "
            "last images are the goals with --goals PATH",
            field="goals",
        )
    if settings.goals is not None and not contract.needs_goal_image:
        raise ConfigError(
            f"this policy ({contract.family}) takes no goal image; leave out --goals", field="goals"
        )
    showing = [arm for arm in settings.arms if ARMS[arm].other_goal]
    if showing and not contract.needs_goal_image:
        raise ConfigError(
            f"{_named(showing)} a policy that is shown a goal image, and this one "
            f"({contract.family}) takes none; leave it out with --baselines "
            f"{_without(settings, showing)}",
            field="baselines",
        )
    needing = [arm for arm in settings.arms if ARMS[arm].other_instruction]
    if needing and not contract.needs_language:
        raise ConfigError(
            f"{_named(needing)} a policy that is told an instruction, and this one "
            f"({contract.family}) takes none; leave it out with --baselines "
            f"{_without(settings, needing)}",
            field="baselines",
        )


def _named(arms: Sequence[Arm]) -> str:
    """``the baseline replay needs`` or ``the baselines replay and swap_images need``."""
    if len(arms) == 1:
        return f"the baseline {arms[0]} needs"
    return f"the baselines {' and '.join(arms)} need"


def _them(arms: Sequence[Arm]) -> str:
    return "it" if len(arms) == 1 else "them"


def _without(settings: RunSettings, arms: Sequence[Arm]) -> str:
    return ",".join(arm for arm in settings.baselines if arm not in arms) or "none"


def _run(plan: RunPlan, keys: Sequence[EpisodeKey], log: ResultsLog, notify: Notify) -> None:
    total = len(plan.settings.all_episodes())
    if len(keys) < total:
        done = total - len(keys)
        notify(f"{done} of {total} episodes are finished in {log.path}; skipped")
    with (
        logging_redirect_tqdm(),  # what the client says while it waits for the server
        tqdm(total=total, initial=total - len(keys), unit="episode", smoothing=0) as progress,
    ):

        def report(result: EpisodeResult) -> None:
            log.append(result)
            progress.set_postfix_str(
                f"task {result.task} state {result.state} {result.arm}: {result.reason}"
            )
            progress.update()

        if plan.settings.ray is not None and keys:
            from reflexarc.eval.ray_workers import run_on_ray

            run_on_ray(plan, keys, report, notify)
        elif plan.settings.workers == 1 or len(keys) <= 1:
            with EpisodeRunner(plan) as runner:
                for key in keys:
                    report(runner.run(key))
        else:
            run_in_processes(plan, keys, report)
