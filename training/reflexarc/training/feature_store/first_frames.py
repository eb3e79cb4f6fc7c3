"""A sha256 of each episode's first frames, kept so that they are not decoded at every start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from reflexarc.contract import Camera
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.training.feature_store.embedding import Frames, recorded_frames

FILE = "first_frames.json"


class FirstFrames:
    """Digests of episodes by what decides them: names, steps, files with sizes and times.

    A file that was written since has another time, so its frames are read again.

    Args:
        folder: of the stores, where earlier digests may lie; None knows of none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._known = {} if folder is None else _read(folder / FILE)
        self._new: dict[str, str] = {}

    def digest(self, episode: DatasetEpisode, cameras: Sequence[Camera]) -> str:
        """sha256 over an episode's names, image steps and the first frame of each camera."""
        what = json.dumps([episode.path.name, episode.demo]).encode()
        steps = np.ascontiguousarray(episode.image_steps)
        sources = json.dumps([[c.name, *episode.image_source(c.name)] for c in cameras]).encode()
        decides = hashlib.sha256(b"\n".join([what, steps.tobytes(), sources])).hexdigest()
        if decides in self._known:
            return self._known[decides]
        digest = hashlib.sha256(what)
        digest.update(steps.data)
        first: Frames = np.zeros(1, dtype=np.int64)
        for camera in cameras:
            digest.update(np.ascontiguousarray(recorded_frames(episode, camera, first)).data)
        self._known[decides] = self._new[decides] = digest.hexdigest()
        return self._known[decides]

    def save(self, folder: Path) -> None:
        """Add what was read to the digests that lie in ``folder``, where it may be written."""
        if not self._new:
            return
        path = folder / FILE
        unfinished = path.with_name(f".{FILE}.{os.getpid()}")
        with suppress(OSError):  # only a help: a folder of stores may be read-only, or full
            unfinished.write_text(json.dumps({**_read(path), **self._new}))
            unfinished.replace(path)
            self._new = {}
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, str]:
    """What lies there; nothing where it cannot be read, since it is only a help."""
    try:
        values = json.loads(path.read_text())
        return {str(key): str(value) for key, value in values.items()}
    except (OSError, ValueError, AttributeError):
        return {}
