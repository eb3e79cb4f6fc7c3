"""A probe as tables: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from reflexarc.training.probe.inputs import RANDOM, STATE, VISION, Z
from reflexarc.training.probe.readings import AFTER, BEFORE, TARGET, Reading, Score
from reflexarc.training.probe.run import ProbeResult

_INPUT_TITLES = {
    Z: "z",
    STATE: "state alone",
    VISION: "pooled vision",
    RANDOM: "random weights",
}
_NONE = "-"


@dataclass(frozen=True)
class Grid:
    """A table as text: title, column titles, rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.columns, tuple("---" if i == 0 else "---:" for i in range(len(self.columns)))]
        table = "\n".join("| " + " | ".join(row) + " |" for row in (*lines, *self.rows))
        return f"### {self.title}\n\n{table}\n"


def terminal_tables(result: ProbeResult) -> list[Table]:
    """The most telling ones: all of them stand in the Markdown."""
    first, *tasks = _by_scope(result.readings)
    grids = [reading_grid(first)]
    if any(reading.target == TARGET for readings in tasks for reading in readings):
        grids.append(task_grid(tasks))
    return [grid.rich() for grid in (*grids, change_grid(result), collapse_grid(result))]


def markdown(result: ProbeResult) -> str:
    """The whole probe for a person."""
    split = result.split
    held_out = (
        "Training held the test episodes out too."
        if split.held_out_in_training
        else "**Training may have seen the test episodes.**"
    )
    lines = [
        f"# Probe of {result.loaded.policy.family} {result.loaded.fingerprint[:12]}",
        f"Linear probes fitted on {len(split.fit)} episodes, tested on {len(split.test)} others "
        f"({int((result.frames.episode >= len(split.fit)).sum())} frames). {held_out}",
        *(f"Note: {remark}." for remark in split.remarks),
        "R² is measured against the mean of the same task in the fitted episodes (0: no better "
        "than knowing the task), with 95 % intervals over episodes; RMSE and std are distances "
        "in mm. A dash: the target moves less than 1 mm, so that there is nothing to explain. "
        "A target is *touched* when it has moved by 1 mm from where the episode began, *grasped* "
        "when by 10 mm.",
        *(reading_grid(readings).markdown() for readings in _by_scope(result.readings)),
        change_grid(result).markdown(),
        _dynamics_note(result),
        collapse_grid(result).markdown(),
        "![z in two dimensions](probe.png)",
    ]
    return "\n\n".join(line.rstrip() for line in lines) + "\n"


def reading_grid(readings: Sequence[Reading]) -> Grid:
    """Everything that was read in one scope."""
    inputs = list(readings[0].scores)
    columns = ["target", "frames", "std mm"]
    for name in inputs:
        columns += [f"R² {_INPUT_TITLES.get(name, name)}", "RMSE mm"]
    rows = []
    for reading in readings:
        cells = [_what(reading), str(reading.frames), f"{reading.std_mm:.1f}"]
        for name in inputs:
            score = reading.scores[name]
            cells += [_r2(score), f"{score.rmse_mm:.1f}"]
        rows.append(tuple(cells))
    return Grid(f"What can be read: {readings[0].scope}", tuple(columns), rows)


def task_grid(scopes: Sequence[Sequence[Reading]]) -> Grid:
    """One row a task: its target object, read from z and from its rivals."""
    rows = []
    for readings in scopes:
        cells = [readings[0].scope.replace("_", " ")]
        for phase in (BEFORE, AFTER):
            found = [r for r in readings if (r.target, r.phase) == (TARGET, phase)]
            if not found:
                cells += [_NONE] * 3
                continue
            scores = found[0].scores
            cells += [f"{found[0].std_mm:.1f}", _r2(scores[Z]), _r2(scores[STATE])]
        rows.append(tuple(cells))
    titles = [
        title
        for phase in (BEFORE, AFTER)
        for title in (f"{phase}: std mm", "R² z", "R² state alone")
    ]
    return Grid("Target object by task, one probe a task", ("task", *titles), rows)


def change_grid(result: ProbeResult) -> Grid:
    rows: list[tuple[str, ...]] = []
    for change in result.changes:
        predicted = (_NONE, _NONE, _NONE)
        if change.predicted_mse is not None and change.mse_over_identity is not None:
            ratio = f"{change.mse_over_identity:.3f}{_interval(change.ratio_interval, 3)}"
            predicted = (f"{change.predicted_mse:.4f}", ratio, str(change.rollouts))
        share = _NONE if change.share_of_random is None else f"{change.share_of_random:.3f}"
        rows.append(
            (
                str(change.horizon),
                str(change.pairs),
                f"{change.identity_mse:.4f}",
                share,
                *predicted,
            )
        )
    columns = (
        "steps ahead",
        "pairs",
        "no change: MSE",
        "share of random pairs'",
        "predicted: MSE",
        "MSE / no change",
        "rollouts",
    )
    return Grid("How z changes, and how much of it is foreseen", columns, rows)


def collapse_grid(result: ProbeResult) -> Grid:
    columns = ("", *(_INPUT_TITLES[name] for name in result.collapse))
    titles = {
        "dimensions": "dimensions",
        "std_min": "std of a dimension: least",
        "std_median": "median",
        "std_max": "most",
        "dead_dimensions": "dead dimensions",
        "rankme": "effective rank (RankMe)",
        "effective_rank": "effective rank around the mean",
        "mean_cosine": "cosine of random pairs",
        "mean_cosine_centred": "the same around the mean",
    }
    values = [found.to_json() for found in result.collapse.values()]
    rows = [(title, *(f"{v[key]:.4g}" for v in values)) for key, title in titles.items()]
    return Grid("Collapse, on the test episodes", columns, rows)


def _dynamics_note(result: ProbeResult) -> str:
    own = result.predictor_horizon
    if own is None:
        return (
            "The checkpoint holds no temporal predictor (objective.safetensors), so only the "
            "error of predicting no change is given."
        )
    return (
        f"The predictor was trained for {own} steps ahead; for multiples of it its predictions "
        "are fed back to it, which training did not do. Other horizons have none."
    )


def _by_scope(readings: Sequence[Reading]) -> list[list[Reading]]:
    scopes: dict[str, list[Reading]] = {}
    for reading in readings:
        scopes.setdefault(reading.scope, []).append(reading)
    return list(scopes.values())


def _what(reading: Reading) -> str:
    name = reading.target if reading.phase == "all" else f"{reading.target}, {reading.phase}"
    return name


def _r2(score: Score) -> str:
    return _NONE if score.r2 is None else f"{score.r2:.2f}{_interval(score.r2_interval)}"


def _interval(found: tuple[float, float] | None, digits: int = 2) -> str:
    return "" if found is None else f" [{found[0]:.{digits}f}, {found[1]:.{digits}f}]"
