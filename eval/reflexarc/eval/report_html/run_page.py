"""The page about one run, written beside its summary."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflexarc.eval.arms import ARMS
from reflexarc.eval.report_html import films, run_episodes, run_tables
from reflexarc.eval.report_html.figures import Picture
from reflexarc.eval.report_html.rendering import Card, Table, counted, render, write_text
from reflexarc.eval.report_table import format_indices
from reflexarc.eval.results import EpisodeResult
from reflexarc.eval.saved_run import read_results, read_summary
from reflexarc.eval.summary import Summary
from reflexarc.eval.worlds import MOBILE_SUITE, world_of

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class RunPage:
    """What the template shows; all of it plain text."""

    kicker: str
    title: str
    subtitle: str
    complete: bool
    cards: Sequence[Card]
    tables: Sequence[Table]
    method: str
    plots: Sequence[tuple[Picture, str]]
    matrix: run_episodes.Matrix
    has_named: bool
    films: Sequence[run_episodes.FilmGroup]
    film_note: str
    facts: Sequence[tuple[str, str]]
    command: str


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a results folder, from what the folder holds.

    Raises ResultsError for a folder without results or summary.
    """
    summary, path = read_summary(folder), folder / REPORT_FILE
    write_text(path, render("report.html.j2", run_page(folder, summary, read_results(folder))))
    return path


def run_page(folder: Path, summary: Summary, results: Sequence[EpisodeResult]) -> RunPage:
    shown = _summarised(summary, results)
    groups = run_episodes.film_groups(shown, films.FilmLibrary(folder))
    identity = summary.identity
    return RunPage(
        kicker=world_of(identity.suite).command,
        title=f"{identity.suite}, {counted(len(summary.tasks), 'task')}, states "
        f"{format_indices(summary.states)}",
        subtitle=f"{len(shown)} episodes; checkpoint "
        f"{identity.checkpoint_fingerprint[:12] or 'without fingerprint'}; "
        f"{identity.execution}, at most {identity.max_steps} steps; seed {identity.seed}",
        complete=summary.complete,
        cards=run_tables.cards(summary),
        tables=run_tables.tables(summary),
        method=run_tables.METHOD,
        plots=run_tables.plots(summary, shown),
        matrix=run_episodes.matrix(shown, groups),
        has_named=any(result.named_success and not result.success for result in shown),
        films=groups,
        film_note=_film_note(groups),
        facts=_facts(summary),
        command=_command(summary, shown),
    )


def _summarised(summary: Summary, results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """The folder's episodes that the summary counts; an earlier call may have left others."""
    tasks = {group.task for group in summary.tasks}
    arms = summary.total.arms if summary.total else {}
    return [r for r in results if r.task in tasks and r.state in summary.states and r.arm in arms]


def _film_note(groups: Sequence[run_episodes.FilmGroup]) -> str:
    shown = [episode.film for group in groups for episode in group.episodes]
    inside = sum(film.video_uri is not None for film in shown)
    strips = sum(bool(film.frames) for film in shown)
    linked = sum(film.video_uri is None and bool(film.href) for film in shown)
    videos, pictures = films.VIDEO_BUDGET_BYTES // 2**20, films.STRIP_BUDGET_BYTES // 2**20
    note = (
        f"This page carries {inside} videos and {strips} filmstrips in itself (at most {videos} "
        f"and {pictures} MiB, in the order in which they stand here)."
    )
    if linked:
        note += f" Videos beyond that are links to the folder videos/ beside it: {linked}."
    return note


def _facts(summary: Summary) -> list[tuple[str, str]]:
    identity = summary.identity
    demonstrations = [
        (f"demonstration of task {task}, sha256", sha256)
        for task, sha256 in sorted(identity.demonstrations.items())
    ]
    return [
        ("suite", identity.suite),
        ("tasks", format_indices(tuple(g.task for g in summary.tasks if g.task is not None))),
        ("initial states", format_indices(summary.states)),
        ("checkpoint", identity.checkpoint_fingerprint or "without fingerprint"),
        ("contract, sha256", identity.contract_sha256),
        ("seed", str(identity.seed)),
        ("steps", f"at most {identity.max_steps}, {identity.execution}, "
         f"wait {identity.wait_steps} before the first"),
        *demonstrations,
        *((name, value or "not set") for name, value in sorted(summary.versions.items())),
    ]  # fmt: skip


def _command(summary: Summary, results: Sequence[EpisodeResult]) -> str:
    """The commands that measure this again; capitals stand for the reader's own paths."""
    identity = summary.identity
    tasks = tuple(group.task for group in summary.tasks if group.task is not None)
    baselines = [arm for arm in run_tables.arms_of(summary) if arm != "policy"]
    named = {} if identity.suite == MOBILE_SUITE else {"--suite": identity.suite}
    options = {
        **named,
        "--tasks": _indices(tasks),
        "--states": _indices(summary.states),
        "--replan-steps": str(identity.replan_steps),
        "--max-steps": str(identity.max_steps),
        "--seed": str(identity.seed),
        "--baselines": ",".join(baselines) or "none",
    }
    if identity.executor != "receding_horizon":
        options["--executor"] = identity.executor
    if identity.injected_latency_ms:
        options["--latency-ms"] = f"{identity.injected_latency_ms:g}"
    if _told_several(results):
        options["--other-task"] = "all"
    if any(ARMS[arm].needs_demonstrations for arm in baselines):
        options["--demonstrations"] = "DEMONSTRATIONS"
    lines = [f"{name} {shlex.quote(value)}" for name, value in options.items()]
    return "serve-policy --ckpt CHECKPOINT\n" + " \\\n    ".join(
        [world_of(identity.suite).command, *lines, "--output OUTPUT"]
    )


def _indices(values: tuple[int, ...]) -> str:
    return format_indices(values).replace(" ", "")


def _told_several(results: Sequence[EpisodeResult]) -> bool:
    told = {(r.task, r.state, r.other_task) for r in results if r.told_instruction is not None}
    return len(told) > len({(task, state) for task, state, _ in told})
