"""One whole probe, as ``reflexarc checkpoint probe`` starts it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.training.probe.collapse import Collapse, measure_collapse
from reflexarc.training.probe.dynamics import (
    Change,
    choose_horizons,
    load_predictor,
    measure_change,
)
from reflexarc.training.probe.episodes import Frames, gather_frames
from reflexarc.training.probe.inputs import (
    RANDOM,
    ProbedInputs,
    Z,
    compute_inputs,
    representation_of,
)
from reflexarc.training.probe.picture import draw
from reflexarc.training.probe.readings import Reading, read_all
from reflexarc.training.probe.scores import DRAWS
from reflexarc.training.probe.split import Split, open_split
from reflexarc.training.run_folder import write_text

FORMAT = 1
JSON_FILE, TEXT_FILE, PICTURE_FILE = "probe.json", "probe.md", "probe.png"


@dataclass(frozen=True)
class ProbeOptions:
    """What to probe with.

    Attributes:
        data: demonstration files or folders.
        per_task: fit on at most this many episodes of each task.
        horizons: control steps of the dynamics; None takes what the data offers.
        feature_cache: a feature store, as training's.
        seed: of folds, resamples, pairs and the random representation.
    """

    data: tuple[Path, ...]
    per_task: int | None = None
    horizons: tuple[int, ...] | None = None
    feature_cache: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class ProbeResult:
    """All that was found, and what is needed to draw it."""

    loaded: LoadedPolicy
    split: Split
    frames: Frames
    probed: ProbedInputs
    readings: list[Reading]
    changes: list[Change]
    predictor_horizon: int | None
    collapse: Mapping[str, Collapse]
    seed: int

    def to_json(self) -> dict[str, Any]:
        policy = self.loaded.policy
        return {
            "format": FORMAT,
            "checkpoint": {
                "fingerprint": self.loaded.fingerprint,
                "family": policy.family,
                "step": self.loaded.provenance.get("step"),
            },
            "data": {
                "fingerprint": self.split.fingerprint,
                "tasks": list(self.frames.task_names),
                "target_objects": dict(self.frames.target_names),
                "fit_episodes": len(self.split.fit),
                "test_episodes": len(self.split.test),
                "frames": len(self.frames.step),
                "held_out_in_training": self.split.held_out_in_training,
                "remarks": list(self.split.remarks),
            },
            "inputs": {name: int(x.shape[1]) for name, x in self.probed.inputs.items()},
            "readings": [asdict(reading) for reading in self.readings],
            "dynamics": {
                "predictor_horizon": self.predictor_horizon,
                "horizons": [asdict(change) for change in self.changes],
            },
            "collapse": {name: found.to_json() for name, found in self.collapse.items()},
            "seed": self.seed,
            "bootstrap_draws": DRAWS,
        }


def probe(loaded: LoadedPolicy, options: ProbeOptions, *, progress: bool = True) -> ProbeResult:
    """Compute z and what it is compared with, and measure. Writes only to the feature store.

    Raises:
        ConfigError: a family without representation, a horizon that the data has not, tasks that
            the checkpoint does not know, too few episodes.
        DatasetError: files that do not hold what a probe needs, such as object positions.
        CheckpointError: a damaged ``objective.safetensors``.
    """
    policy = loaded.policy
    representation = representation_of(policy)
    split = open_split(options.data, loaded.provenance, options.per_task)
    predictor = load_predictor(loaded.directory, policy.contract.action.dimension, representation)
    own = predictor.horizon if predictor else None
    horizons = choose_horizons(split.test, options.horizons, own)
    frames = gather_frames(split.episodes)
    split = replace(split, remarks=(*split.remarks, *frames.remarks))
    probed = compute_inputs(
        loaded,
        split,
        options.feature_cache,
        target=predictor.target if predictor else None,
        seed=options.seed,
        progress=progress,
    )
    test = frames.episode >= len(split.fit)
    first = {i: int(np.searchsorted(frames.episode, i)) for i in range(len(split.episodes))}
    rows = {e: first[i] for i, e in enumerate(split.episodes) if i >= len(split.fit)}
    tasks = np.array([frames.task_names.index(episode.task_name) for episode in rows])
    changes = measure_change(
        probed, rows, tasks, horizons, loaded.processor, predictor, seed=options.seed
    )
    held_out = {name: probed.inputs[name][test] for name in (Z, RANDOM)}
    return ProbeResult(
        loaded=loaded,
        split=split,
        frames=frames,
        probed=probed,
        readings=list(read_all(frames, probed.inputs, test, seed=options.seed)),
        changes=changes,
        predictor_horizon=own,
        collapse={
            name: measure_collapse(z.astype(np.float64), seed=options.seed)
            for name, z in held_out.items()
        },
        seed=options.seed,
    )


def check_output(output: Path, loaded: LoadedPolicy) -> None:
    """Raise ConfigError where ``output`` holds the probe of another checkpoint."""
    path = output / JSON_FILE
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; name a folder", field="output")
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text())["checkpoint"]["fingerprint"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != loaded.fingerprint:
        raise ConfigError(
            f"{path} is of another checkpoint ({str(found)[:12]}…, this one is "
            f"{loaded.fingerprint[:12]}…); name another --output",
            field="output",
        )


def write_result(result: ProbeResult, output: Path, text: str) -> Sequence[Path]:
    """Write ``probe.json``, ``probe.md`` (``text``) and ``probe.png``; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / name for name in (JSON_FILE, TEXT_FILE, PICTURE_FILE)]
    write_text(paths[0], json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
    write_text(paths[1], text)
    frames, z = result.frames, result.probed.inputs[Z]
    name = f"{result.loaded.policy.family} {result.loaded.fingerprint[:12]}"
    draw(
        paths[2],
        z.astype(np.float64),
        frames.task,
        frames.progress,
        frames.task_names,
        f"{name}: {len(z)} frames of {len(frames.episodes)} episodes",
        seed=result.seed,
    )
    return paths
