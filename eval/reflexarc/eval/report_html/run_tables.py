"""Headline numbers, tables and plots of one run, from its summary and episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from reflexarc.eval.arms import ARMS, Arm
from reflexarc.eval.report_html.figures import (
    Curve,
    Picture,
    Rate,
    Series,
    interval_plot,
    share_plot,
)
from reflexarc.eval.report_html.rendering import (
    NBSP,
    NOTHING,
    Card,
    Cell,
    Row,
    Table,
    difference_note,
    limits,
    p_value,
    percent,
    point_limits,
    points,
    rate_note,
)
from reflexarc.eval.results import EpisodeResult
from reflexarc.eval.summary import (
    ArmSummary,
    DifferenceSummary,
    GroupSummary,
    RateSummary,
    Summary,
)

NOT_RUN = Cell(NOTHING)
METHOD = (
    "Rates carry 95 % Wilson intervals. A lead is the policy's rate minus the other arm's on the "
    "same initial states, in percentage points, with the 95 % interval of Newcombe's method 10 "
    "for paired proportions and the exact two-sided McNemar p; before p stands how many states "
    "only the policy and only the other arm solved. The total pools all episodes."
)


def groups_of(summary: Summary) -> list[GroupSummary]:
    """The tasks, then the total."""
    return [*summary.tasks, *([summary.total] if summary.total else [])]


def arms_of(summary: Summary) -> list[Arm]:
    """The arms that were run, the policy first."""
    return [arm for arm in ARMS if any(arm in group.arms for group in groups_of(summary))]


def group_name(group: GroupSummary) -> str:
    return group.instruction if group.task is None else f"{group.task}: {group.instruction}"


def cards(summary: Summary) -> list[Card]:
    """Headline numbers of all tasks together."""
    total = summary.total
    if total is None:
        return []
    found = [_rate_card(ARMS[arm].title, one) for arm, one in total.arms.items() if arm == "policy"]
    found += [
        Card(
            f"lead over {ARMS[arm].title}",
            points(one.difference),
            difference_note(one.low, one.high, one.mcnemar_p),
            unit="points",
        )
        for arm, one in total.differences.items()
    ]
    found += [
        _rate_card(f"{ARMS[arm].title}: the goal it was told", one.named)
        for arm, one in total.arms.items()
        if one.named is not None
    ]
    policy = total.arms.get("policy")
    if policy is not None and policy.latency_median_ms is not None:
        found.append(
            Card("median latency", f"{policy.latency_median_ms:.0f} ms", "round trip of a request")
        )
    return found


def _rate_card(title: str, one: RateSummary) -> Card:
    note = rate_note(one.successes, one.trials, one.low, one.high)
    return Card(title, percent(one.rate), note)


def tables(summary: Summary) -> list[Table]:
    """Success per task, leads per task (where there are other arms), and what each arm took."""
    found = [_success_table(summary)]
    if any(group.differences for group in summary.tasks):
        found.append(_difference_table(summary))
    if summary.total:
        found.append(_effort_table(summary.total))
    return found


def _success_table(summary: Summary) -> Table:
    groups, headers = groups_of(summary), ["task"]
    columns: list[Callable[[GroupSummary], RateSummary | None]] = []
    for arm in arms_of(summary):
        headers.append(ARMS[arm].title)
        columns.append(lambda group, arm=arm: group.arms.get(arm))  # type: ignore[misc]
        if any(_named(group, arm) for group in groups):
            headers.append(f"{ARMS[arm].title}: goal told")
            columns.append(lambda group, arm=arm: _named(group, arm))  # type: ignore[misc]
    rows = [
        Row(group_name(group), [_rate_cell(of(group)) for of in columns], group.task is None)
        for group in groups
    ]
    return Table("Success per task, with 95 % intervals", headers, rows)


def _named(group: GroupSummary, arm: Arm) -> RateSummary | None:
    found = group.arms.get(arm)
    return found.named if found else None


def _rate_cell(one: RateSummary | None) -> Cell:
    if one is None:
        return NOT_RUN
    return Cell(f"{one.successes}/{one.trials}", [limits(one.low, one.high)])


def _difference_table(summary: Summary) -> Table:
    groups = groups_of(summary)
    arms = [arm for arm in arms_of(summary) if any(arm in group.differences for group in groups)]
    rows = [
        Row(
            group_name(group),
            [_difference_cell(group.differences.get(arm)) for arm in arms],
            group.task is None,
        )
        for group in groups
    ]
    headers = [f"over {ARMS[arm].title}" for arm in arms]
    return Table("The policy's lead in percentage points", ["task", *headers], rows)


def _difference_cell(one: DifferenceSummary | None) -> Cell:
    if one is None:
        return NOT_RUN
    split = f"{one.policy_only} : {one.baseline_only}, p{NBSP}{p_value(one.mcnemar_p)}"
    return Cell(points(one.difference), [point_limits(one.low, one.high), split])


def _effort_table(total: GroupSummary) -> Table:
    rows = [Row(ARMS[arm].title, _effort_cells(one)) for arm, one in total.arms.items()]
    return Table(
        "What the arms took: mean steps (failures count with all theirs) and latency",
        ["arm", "mean steps", "median latency"],
        rows,
    )


def _effort_cells(one: ArmSummary) -> list[Cell]:
    latency = one.latency_median_ms
    return [
        Cell(f"{one.mean_steps:.0f}"),
        NOT_RUN if latency is None else Cell(f"{latency:.0f} ms"),
    ]


def plots(summary: Summary, results: Sequence[EpisodeResult]) -> list[tuple[Picture, str]]:
    """Pictures with their captions."""
    found = [_success_plot(summary), _length_plot(summary, results)]
    latency = _latency_plot(summary, results)
    return [*found, latency] if latency else found


def _success_plot(summary: Summary) -> tuple[Picture, str]:
    groups = groups_of(summary)
    series = [
        Series(ARMS[arm].title, [_plain(group.arms.get(arm)) for group in groups])
        for arm in arms_of(summary)
    ]
    series += [
        Series(f"{ARMS[arm].title}: goal told", [_plain(_named(group, arm)) for group in groups])
        for arm in arms_of(summary)
        if any(_named(group, arm) for group in groups)
    ]
    picture = interval_plot(
        [group_name(group) for group in groups],
        series,
        alt="Success per task and arm with 95 % intervals: the numbers of the table above.",
        x_label="success in %",
    )
    return picture, "Success per task with 95 % Wilson intervals."


def _plain(one: RateSummary | None) -> Rate | None:
    return None if one is None else Rate(one.rate, one.low, one.high)


def _length_plot(summary: Summary, results: Sequence[EpisodeResult]) -> tuple[Picture, str]:
    curves, words = [], []
    for arm in arms_of(summary):
        rows = [result for result in results if result.arm == arm]
        steps = [float(result.steps) for result in rows if result.success]
        curves.append(Curve(ARMS[arm].title, steps, len(rows)))
        took = f"half of its successes within {median(steps):.0f} steps" if steps else "none"
        words.append(f"{ARMS[arm].title} {len(steps)} of {len(rows)}, {took}")
    picture = share_plot(
        curves,
        alt=f"Share of episodes solved within a number of steps: {'; '.join(words)}.",
        x_label="steps",
        y_label="episodes solved in %",
        end=float(summary.identity.max_steps),
    )
    return picture, (
        "Episode lengths: share of episodes that have reached the task's goal within so many "
        f"steps. An episode ends at {summary.identity.max_steps} steps."
    )


def _latency_plot(summary: Summary, results: Sequence[EpisodeResult]) -> tuple[Picture, str] | None:
    typical = [r.latency_median_ms for r in results if r.latency_median_ms is not None]
    longest = [r.latency_max_ms for r in results if r.latency_max_ms is not None]
    if not typical or not longest:
        return None
    picture = share_plot(
        [
            Curve("an episode's median request", typical, len(typical)),
            Curve("an episode's slowest request", longest, len(longest)),
        ],
        alt=(
            f"Latency over {len(typical)} episodes: half have a median request within "
            f"{median(typical):.0f} ms and a slowest one within {median(longest):.0f} ms; the "
            f"slowest request of all took {max(longest):.0f} ms."
        ),
        x_label="round trip in ms",
        y_label="episodes in %",
    )
    return picture, (
        "Latency: each episode's median and slowest round trip as the client saw it, over the "
        f"{len(typical)} episodes of arms that ask the server. The slowest request took "
        f"{max(longest):.0f} ms."
    )
