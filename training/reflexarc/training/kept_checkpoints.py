"""Which checkpoints of a run stay: the last, the best few by a metric, and every so many steps.

``checkpoints/ranking.json`` holds the metrics of the best. First a checkpoint is written, then it
joins the ranking, then ``last`` points to it, then ``best`` is set, the others are removed: a run
that was killed anywhere in between resumes at ``last``, and whatever stands beyond it is removed.
"""

from __future__ import annotations

import json
from pathlib import Path

from reflexarc.training.run_folder import RunFolder, write_text


class KeptCheckpoints:
    """Decides what to save and what to remove; less of the metric is better, the earlier wins ties.

    Args:
        run: whose checkpoints.
        best: how many of the best are kept; the first of them is what ``best`` names.
        every: checkpoints at multiples of so many optimiser steps are kept for good.
        writes: False in all processes of a run but the first: they decide alike, write nothing.
    """

    def __init__(
        self, run: RunFolder, *, best: int = 1, every: int | None = None, writes: bool = True
    ) -> None:
        self._run, self._best, self._every, self._writes = run, best, every, writes
        self._ranking: dict[int, float] = {}

    @property
    def ranking(self) -> dict[int, float]:
        """Step to metric of the best checkpoints, best first."""
        return dict(sorted(self._ranking.items(), key=lambda item: (item[1], item[0])))

    def wants(self, step: int, metric: float | None) -> bool:
        """Whether a checkpoint of this step would be kept when it is no longer ``last``.

        ``metric`` is what validation gave at this very step, None where there was none.
        """
        return self._is_milestone(step) or (
            metric is not None
            and (len(self._ranking) < self._best or metric < max(self._ranking.values()))
        )

    def add(self, step: int, metric: float | None) -> None:
        """``run.checkpoint(step)`` is written: point to it, and remove what is no longer kept."""
        if metric is not None:
            self._ranking[step] = metric
        if self._writes:
            self._write_ranking()  # with the one that falls out, should `last` not be reached
            self._run.point("last", self._run.checkpoint(step))
        self._drop_worse()
        self._settle(step)

    def resume(self, step: int, best: tuple[int, float] | None = None) -> None:
        """Take up a run whose ``last`` stands at ``step``; what a killed one did beyond is undone.

        ``best`` is the step and metric of the best so far, for runs older than the ranking.
        """
        known = read_ranking(self._run)
        if known is None:
            known = {} if best is None else {best[0]: best[1]}
        self._ranking = {
            at: metric
            for at, metric in known.items()
            if at <= step and self._run.checkpoint(at).is_dir()
        }
        self._drop_worse()
        self._settle(step)

    def _drop_worse(self) -> None:
        for worse in list(self.ranking)[self._best :]:
            del self._ranking[worse]

    def _is_milestone(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def _settle(self, step: int) -> None:
        """Write the ranking, let ``best`` name its first, and remove what is not kept.

        Checkpoints beyond ``step`` are of a process that was killed before it pointed to them.
        """
        if not self._writes:
            return
        best = [self._run.checkpoint(at) for at in self.ranking]
        self._write_ranking()
        if best:
            self._run.point("best", best[0])
        milestones = [
            folder
            for at, folder in self._run.checkpoint_folders().items()
            if at <= step and self._is_milestone(at)
        ]
        self._run.discard_old_checkpoints([*best, *milestones])

    def _write_ranking(self) -> None:
        named = {f"{at:08d}": metric for at, metric in self.ranking.items()}
        write_text(ranking_file(self._run), json.dumps(named, indent=2) + "\n")


def ranking_file(run: RunFolder) -> Path:
    return run.checkpoints / "ranking.json"


def read_ranking(run: RunFolder) -> dict[int, float] | None:
    """Step to metric as ``ranking.json`` has it; None where there is none that can be read."""
    try:
        values = json.loads(ranking_file(run).read_text(encoding="utf-8"))
        return {int(step): float(metric) for step, metric in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
