"""The table of an evaluation, for the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reflexarc.eval.arms import ARMS, Arm
from reflexarc.eval.summary import DifferenceSummary, GroupSummary, RateSummary, Summary


def rich_table(summary: Summary) -> RenderableType:
    """The summary as a table that fits 80 columns; the total stands last, under a rule.

    With more than two baselines rates and differences are two tables.
    """
    headers, rows = table_rows(summary)
    title, caption = _title(summary), _caption(summary)
    differences = [i for i, header in enumerate(headers) if header.startswith("over ")]
    if len(differences) <= 2:
        return _table(headers, rows, title, caption)
    rates = range(differences[0])
    others = (0, *range(differences[0], len(headers)))
    parts = [
        ([headers[i] for i in c], [[row[i] for i in c] for row in rows]) for c in (rates, others)
    ]
    return Group(
        _table(*parts[0], title, None), _table(*parts[1], "the policy's lead over", caption)
    )


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str, caption: str | None
) -> Table:
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column(headers[0], overflow="fold", min_width=12)
    for header in headers[1:]:
        # The interval goes under its estimate, to keep columns narrow.
        table.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        cells = [Text(row[0]), *(Text(cell.replace(" [", "\n[")) for cell in row[1:])]
        table.add_row(*cells, end_section=index == len(rows) - 2)
    return table


def markdown(summary: Summary) -> str:
    """The same table for a README, with what it was measured on."""
    headers, rows = table_rows(summary)
    lines = [
        f"### {_title(summary)}",
        "",
        "| " + " | ".join(headers) + " |",
        "|" + "|".join(" :-- " if i == 0 else " --: " for i in range(len(headers))) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        _caption(summary),
    ]
    return "\n".join(lines) + "\n"


def table_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """``(headers, rows)``: one row a task and the total; only arms that were run."""
    groups = [*summary.tasks, *([summary.total] if summary.total else [])]
    arms = [arm for arm in ARMS if any(arm in group.arms for group in groups)]
    named = [arm for arm in arms if any(_named(group, arm) for group in groups)]
    baselines = [arm for arm in arms if any(arm in group.differences for group in groups)]
    headers = [
        "task",
        *(ARMS[arm].title for arm in arms),
        *("goal named instead" for _ in named),
        *(f"over {arm.replace('_', ' ')}" for arm in baselines),
        "mean steps",
        "median latency",
    ]
    return headers, [_row(group, arms, named, baselines) for group in groups]


def _row(group: GroupSummary, arms: list[Arm], named: list[Arm], baselines: list[Arm]) -> list[str]:
    name = group.instruction if group.task is None else f"{group.task}: {group.instruction}"
    policy = group.arms.get("policy")
    latency = policy.latency_median_ms if policy else None
    return [
        name,
        *(_rate(group.arms.get(arm)) for arm in arms),
        *(_rate(_named(group, arm)) for arm in named),
        *(_difference(group.differences.get(arm)) for arm in baselines),
        f"{policy.mean_steps:.0f}" if policy else "-",
        f"{latency:.0f} ms" if latency is not None else "-",
    ]


def _named(group: GroupSummary, arm: Arm) -> RateSummary | None:
    return group.arms[arm].named if arm in group.arms else None


def _rate(found: RateSummary | None) -> str:
    if found is None:
        return "-"
    low, high = 100 * found.low, 100 * found.high
    return f"{found.successes}/{found.trials} [{low:.0f}, {high:.0f}]"


def _difference(found: DifferenceSummary | None) -> str:
    if found is None:
        return "-"
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.difference:+.0f} [{low:+.0f}, {high:+.0f}]"


def _title(summary: Summary) -> str:
    state = "" if summary.complete else " (incomplete)"
    return f"{summary.identity.suite}, init states {format_indices(summary.states)}{state}"


def _caption(summary: Summary) -> str:
    identity = summary.identity
    checkpoint = identity.checkpoint_fingerprint[:12] or "without fingerprint"
    p_values = [
        f"exact McNemar p against {ARMS[arm].title} {found.mcnemar_p:.2g}"
        for arm, found in (summary.total.differences.items() if summary.total else ())
    ]
    parts = [
        "Successes, with 95 % Wilson intervals in %; the policy's lead over a baseline on the "
        "same states in percentage points, with 95 % Newcombe intervals (method 10, paired)",
        *_explanations(summary),
        *p_values,
        f"steps and latency are the policy's; {identity.execution}, at most "
        f"{identity.max_steps} steps; seed {identity.seed}; checkpoint {checkpoint}",
    ]
    return "; ".join(parts) + "."


def _explanations(summary: Summary) -> list[str]:
    found = summary.total.arms if summary.total else {}
    if "other_instruction" not in found:
        return []
    return [
        "under 'other instruction' the policy is told another task's instruction, and the task's "
        "own goal counts"
        + ("; 'goal named instead' counts the goal it was told" if _named_any(summary) else "")
    ]


def _named_any(summary: Summary) -> bool:
    return summary.total is not None and any(arm.named for arm in summary.total.arms.values())


def format_indices(indices: tuple[int, ...]) -> str:
    """``(40, 41, 42, 49)`` as ``40-42, 49``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
