"""Episodes of a mobile robot as one dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import ActionSpec, Orientation, StateSpec
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.data.lerobot.mapping import UNLIMITED
from reflexarc.data.libero_layout import natural_key
from reflexarc.data.mobile.episode import MobileEpisode, read_episode
from reflexarc.data.mobile.layout import CAMERA, DEFAULT_PATTERN, VELOCITIES
from reflexarc.data.presence import exists

STATE_LAYOUT = "none"


@dataclass(frozen=True)
class MobileDataset:
    """Implements :class:`reflexarc.data.dataset.EpisodeDataset`."""

    episodes: list[MobileEpisode]
    control_hz: float
    orientations: tuple[Orientation, ...] = ("upright",)
    cameras: tuple[str, ...] = (CAMERA,)

    def layout(self, wanted: str) -> str:
        """The only one: no state."""
        return STATE_LAYOUT

    def subset(self, episodes: Sequence[DatasetEpisode]) -> MobileDataset:
        chosen = {id(episode) for episode in episodes}
        return MobileDataset([e for e in self.episodes if id(e) in chosen], self.control_hz)

    def state_spec(self, layout: str) -> StateSpec:
        return StateSpec(layout=STATE_LAYOUT, names=())

    def action_spec(self, horizon: int) -> ActionSpec:
        """Velocities, whose limits are what was demonstrated."""
        count = len(VELOCITIES)
        return ActionSpec(
            names=VELOCITIES,
            horizon=horizon,
            kind="velocity",
            control_hz=self.control_hz,
            low=(-UNLIMITED,) * count,
            high=(UNLIMITED,) * count,
        )

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"reflexarc-mobile-1 {self.control_hz:g}\n".encode())
        for episode in self.episodes:
            digest.update(json.dumps(episode.identity()).encode() + b"\n")
            digest.update(np.ascontiguousarray(episode.actions(), dtype="<f8").tobytes())
        return digest.hexdigest()

    def check_images(self) -> None:
        """Nothing: opening has checked the shapes, and a cut file does not open."""


def is_mobile(path: Path, pattern: str | None = None) -> bool:
    """Whether ``path`` is, or holds, episodes of a mobile robot."""
    if not path.is_dir():
        return path.suffix == ".h5" or (pattern is not None and path.match(pattern))
    return any(path.rglob(pattern or DEFAULT_PATTERN))


def open_mobile(
    paths: Sequence[Path],
    *,
    pattern: str | None = None,
    control_hz: float | None = None,
    fallback_instruction: str | None = None,
) -> MobileDataset:
    """Open files, or those below folders whose names match ``pattern``, in natural order.

    Args:
        pattern: a shell pattern of file names; None takes ``*.h5``.
        control_hz: of episodes that do not say at what rate they were recorded.
        fallback_instruction: of episodes that hold none.

    Raises DatasetError naming file and key, for a pattern that nothing matches, and for episodes
    of different rates.
    """
    episodes = [read_episode(path, fallback_instruction) for path in find_episodes(paths, pattern)]
    rates = {episode.control_hz or control_hz for episode in episodes}
    if None in rates:
        silent = next(e for e in episodes if e.control_hz is None)
        raise DatasetError(
            f"{silent.path} does not say at how many hertz it was recorded (attribute "
            "control_hz); give it with data.control_hz",
            field="data.control_hz",
        )
    known = sorted(rate for rate in rates if rate is not None)
    if len(known) > 1:
        raise DatasetError(
            f"episodes of {', '.join(f'{rate:g}' for rate in known)} Hz cannot be mixed: a chunk "
            "has one rate; choose some with data.pattern",
            field="data.pattern",
        )
    return MobileDataset(episodes, known[0])


def find_episodes(paths: Sequence[Path], pattern: str | None) -> list[Path]:
    """The files that ``paths`` name, folders searched, each once."""
    found: list[Path] = []
    wanted = pattern or DEFAULT_PATTERN
    for path in map(Path, paths):
        if not exists(path):
            raise DatasetError(f"{path} does not exist; name an HDF5 file or a folder of them")
        inside = [path]
        if path.is_dir():
            hits = (file for file in path.rglob(wanted) if not file.name.startswith("."))
            inside = sorted(hits, key=lambda file: natural_key(str(file)))
            if not inside:
                raise DatasetError(
                    f"{path} holds no file that matches {wanted!r}; mend data.pattern, or collect "
                    "episodes with: reflexarc data collect-mobile",
                    field="data.pattern",
                )
        found.extend(inside)
    if len({path.resolve() for path in found}) < len(found):
        raise DatasetError("an episode is named twice; it would count twice", field="data.paths")
    return found
