"""Which modules a run trains and how fast, as a table for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table

from reflexarc.policy.interface import Policy
from reflexarc.training.config import Recipe
from reflexarc.training.distributed.engine import TrainedModules
from reflexarc.training.objective import Objective
from reflexarc.training.optimization import scale_of


@dataclass(frozen=True)
class ModuleRow:
    """One module whose parameters all learn alike.

    Attributes:
        path: as ``freeze`` and ``learning_rate_scale`` name it; of the objective with its name.
        parameters: how many numbers it holds.
        learning_rate: at the schedule's peak; None where it keeps its weights.
    """

    path: str
    parameters: int
    learning_rate: float | None


def module_rows(recipe: Recipe, policy: Policy, objective: Objective) -> list[ModuleRow]:
    """The children of policy and objective; those that do not learn alike in their parts."""
    scales = {f"policy.{path}": factor for path, factor in recipe.learning_rate_scale.items()}
    found: dict[str, tuple[int, float | None]] = {}
    for name, parameter in TrainedModules(policy, objective).named_parameters():
        rate = recipe.optimizer.learning_rate * scale_of(name, scales)
        found[name] = (parameter.numel(), rate if parameter.requires_grad else None)
    return [
        ModuleRow(path.removeprefix("policy."), count, rate)
        for path, count, rate in _alike(found, depth=2)
    ]


def module_table(recipe: Recipe, policy: Policy, objective: Objective) -> Table:
    """:func:`module_rows` for a terminal."""
    table = Table(title="modules", title_justify="left")
    table.add_column("module", overflow="fold")
    for heading in ("parameters", "trained", "learning rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in module_rows(recipe, policy, objective):
        trained = row.learning_rate is not None
        rate = f"{row.learning_rate:g}" if trained else "-"
        table.add_row(row.path, f"{row.parameters:,}", "yes" if trained else "no", rate)
    return table


def _alike(
    parameters: Mapping[str, tuple[int, float | None]], depth: int
) -> Iterator[tuple[str, int, float | None]]:
    """Path, size and rate of the shortest paths from ``depth`` on under which all rates agree."""
    groups: dict[str, dict[str, tuple[int, float | None]]] = {}
    for name, value in parameters.items():
        groups.setdefault(".".join(name.split(".")[:depth]), {})[name] = value
    for path, members in groups.items():
        rates = {rate for _, rate in members.values()}
        if len(rates) == 1:
            yield path, sum(count for count, _ in members.values()), rates.pop()
        else:
            yield from _alike(members, depth + 1)
