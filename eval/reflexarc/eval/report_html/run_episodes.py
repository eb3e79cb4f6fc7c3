"""Every episode of a run: the matrix of outcomes, and the films in the order of their interest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reflexarc.eval.arms import ARMS, Arm
from reflexarc.eval.report_html.films import Film, FilmLibrary
from reflexarc.eval.results import EpisodeKey, EpisodeResult


@dataclass(frozen=True)
class Mark:
    """An outcome, for the eye (``kind``: good, bad or named) and in words."""

    kind: str
    text: str
    words: str
    anchor: str | None = None


@dataclass(frozen=True)
class MatrixRow:
    name: str
    marks: Sequence[Mark | None]


@dataclass(frozen=True)
class Matrix:
    """Outcomes: one row a task and arm, one column a state; None where nothing was run."""

    states: Sequence[int]
    rows: Sequence[MatrixRow]


@dataclass(frozen=True)
class FilmedEpisode:
    anchor: str
    title: str
    instruction: str
    mark: Mark
    film: Film


@dataclass(frozen=True)
class FilmGroup:
    """Films of one arm and kind of outcome; ``open`` says whether the page shows them at once."""

    title: str
    open: bool
    episodes: Sequence[FilmedEpisode]


def matrix(results: Sequence[EpisodeResult], filmed: Sequence[FilmGroup]) -> Matrix:
    """Rows by task, then arm, then the other task of arms that have one."""
    anchors = {episode.anchor for group in filmed for episode in group.episodes}
    states = sorted({result.state for result in results})
    lines: dict[tuple[int, int, int | None], dict[int, EpisodeResult]] = {}
    for result in sorted(results, key=_place):
        line = (result.task, _rank(result.arm), result.other_task)
        lines.setdefault(line, {})[result.state] = result
    rows = [
        MatrixRow(_line_name(line), [_linked(line.get(state), anchors) for state in states])
        for line in lines.values()
    ]
    return Matrix(states, rows)


def _line_name(line: Mapping[int, EpisodeResult]) -> str:
    first = next(iter(line.values()))
    return f"{first.task}, {_arm_name(first)}"


def _linked(result: EpisodeResult | None, anchors: set[str]) -> Mark | None:
    if result is None:
        return None
    name = anchor(result.key)
    return mark(result, name if name in anchors else None)


def mark(result: EpisodeResult, link: str | None = None) -> Mark:
    """How an episode ended."""
    if result.success:
        return Mark("good", f"✓ {result.steps}", f"success after {result.steps} steps", link)
    if result.named_success:
        words = f"reached the goal it was told after {result.steps} steps"
        return Mark("named", f"→ {result.steps}", words, link)
    return Mark("bad", "✗", f"failure, {result.reason} after {result.steps} steps", link)


def film_groups(results: Sequence[EpisodeResult], library: FilmLibrary) -> list[FilmGroup]:
    """Failures first: the policy's, then the other arms'; then successes in the same order.

    The library spends its budgets in this order too.
    """
    groups = []
    for failed in (True, False):
        for arm in ARMS:
            rows = [r for r in results if r.arm == arm and r.success != failed]
            episodes = _filmed(rows, library)
            if episodes:
                kind = "failures" if failed else "successes"
                title = f"{ARMS[arm].title}, {kind}: {_counted(len(episodes), len(rows))}"
                # Long pages hide their point: what is expected to fail starts closed.
                groups.append(FilmGroup(title, failed and arm == "policy", episodes))
    return groups


def _counted(filmed: int, total: int) -> str:
    return str(total) if filmed == total else f"{total}, {filmed} of them filmed"


def _filmed(rows: Sequence[EpisodeResult], library: FilmLibrary) -> list[FilmedEpisode]:
    found = []
    for result in sorted(rows, key=_place):
        film = library.film(result)
        if film is not None:
            title = f"Task {result.task}, state {result.state}, {_arm_name(result)}"
            told = result.told_instruction
            words = f"{result.instruction}; told: {told}" if told else result.instruction
            found.append(FilmedEpisode(anchor(result.key), title, words, mark(result), film))
    return found


def anchor(key: EpisodeKey) -> str:
    """The episode's id on the page."""
    other = "" if key.other_task is None else f"-{key.other_task}"
    return f"task{key.task}-state{key.state}-{key.arm}{other}"


def _arm_name(result: EpisodeResult) -> str:
    title = ARMS[result.arm].title
    return title if result.other_task is None else f"{title} (task {result.other_task})"


def _rank(arm: Arm) -> int:
    return list(ARMS).index(arm)


def _place(result: EpisodeResult) -> tuple[int, int, int, int]:
    other = -1 if result.other_task is None else result.other_task
    return (result.task, _rank(result.arm), other, result.state)
