"""Names of the objects whose positions a dataset from LIBERO's files holds."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from reflexarc.data.lerobot.hdf5_values import decode_value
from reflexarc.data.lerobot.info import read_json

POSITIONS = "libero.object_positions"
"""Column ``(rows, O, 3)`` of metres, world frame."""


def object_names(file: Path, place: int) -> tuple[str, ...]:
    """Of the episode at ``place`` in the parquet file ``file``; empty where it has none."""
    names = _of_file(file.with_suffix(".json"))
    return names[place] if place < len(names) else ()


@lru_cache(maxsize=16)
def _of_file(path: Path) -> tuple[tuple[str, ...], ...]:
    """Read once: beside the names stand the simulator's models, which are large."""
    found = []
    for demo in read_json(path).get("demos") or ():
        encoded = demo["attributes"].get("object_names")
        found.append(() if encoded is None else tuple(json.loads(decode_value(encoded))))
    return tuple(found)
