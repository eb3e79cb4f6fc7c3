"""Predicted chunks against what was done, along one recorded episode: a picture to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reflexarc.client.executors.asking import ChunkPolicy
from reflexarc.eval.offline_data import RecordedEpisode
from reflexarc.eval.offline_summary import write_atomically
from reflexarc.eval.report_html.palette import LIGHT

_DOTS_PER_INCH = 130


@dataclass(frozen=True)
class PredictedChunks:
    """What a policy said along an episode.

    Attributes:
        steps: ``int64 (N,)`` at which it was asked.
        chunks: ``float32 (N, H, D)``.
        actions: ``float64 (T, D)`` that were recorded.
        names: of the D dimensions.
        title: whose.
    """

    steps: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float64]
    names: tuple[str, ...]
    title: str

    def mean_absolute_errors(self) -> list[float]:
        """Of each dimension, over all steps of all chunks that the episode reaches."""
        errors = [
            np.abs(chunk[: len(self.actions) - step] - self.actions[step : step + len(chunk)])
            for step, chunk in zip(self.steps, self.chunks, strict=True)
        ]
        means: list[float] = np.concatenate(errors).mean(axis=0).tolist()
        return means


def ask_along(policy: ChunkPolicy, recorded: RecordedEpisode, seed: int) -> PredictedChunks:
    """One chunk at each of the episode's steps."""
    contract = policy.contract
    observations = recorded.observations(contract, seed)
    chunks = [policy.infer(observation).actions for observation in observations]
    return PredictedChunks(
        steps=recorded.steps,
        chunks=np.stack(chunks),
        actions=recorded.actions(),
        names=contract.action.names,
        title=f"{recorded.name}: {recorded.episode.instruction}",
    )


def write_chunk_plot(predicted: PredictedChunks, path: Path) -> None:
    """A PNG, written atomically: a panel a dimension, what was done and every chunk over it."""
    count = len(predicted.names)
    columns = 2 if count > 1 else 1
    rows = -(-count // columns)
    figure = Figure(figsize=(10, 1.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten().tolist()
    errors = predicted.mean_absolute_errors()
    for number, (axes, name) in enumerate(zip(panels, predicted.names, strict=False)):
        for step, chunk in zip(predicted.steps, predicted.chunks, strict=True):
            along = np.arange(step, step + len(chunk))
            axes.plot(along, chunk[:, number], color=LIGHT.series[0], linewidth=0.8, alpha=0.6)
            axes.plot(step, chunk[0, number], ".", color=LIGHT.series[0], markersize=4)
        axes.plot(predicted.actions[:, number], color="black", linewidth=1.4)
        axes.set_title(f"{name}: MAE {errors[number]:.3f}", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in panels[count:]:
        axes.set_visible(False)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(predicted.title, fontsize=10)
    figure.supxlabel("control step", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    write_atomically(path, picture.getvalue())


def _legend() -> Sequence[Line2D]:
    return [
        Line2D([], [], color="black", linewidth=1.4, label="recorded"),
        Line2D([], [], color=LIGHT.series[0], marker=".", linewidth=0.8, label="predicted chunks"),
    ]
