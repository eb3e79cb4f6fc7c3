"""Where several processes of one machine hold features: once in its memory, not once each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reflexarc.training.feature_store import holding
from reflexarc.training.feature_store.holding import hold_features

CPU = torch.device("cpu")
PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from reflexarc.training.feature_store import holding
from reflexarc.training.feature_store.holding import hold_features

def anonymous():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) / 1024

array = np.load(sys.argv[1], mmap_mode="r")
holding.free_memory = lambda: 5 * array.nbytes
began = anonymous()
held = hold_features({"vision": array}, torch.device("cpu"), processes=int(sys.argv[2]))
taken = anonymous() - began
rows = held.rows["vision"]
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
total = 0.0
for row in rows[:, ::1024]:
    total += float(row.sum())
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
print(f"{held.place}|{taken}|{faults}|{total}")
"""


def held_by(path: Path, processes: int) -> tuple[str, float, int, float]:
    """Place, MiB that the process alone takes, page faults while reading, sum of what was read."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(processes)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    place, taken, faults, total = output.strip().split("|")
    return place, float(taken), int(faults), float(total)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "vision.npy"
    np.save(path, np.ones((512, 65536), np.float16))  # 64 MiB
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_copy_leaves_nothing_of_the_file_in_the_map(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a process seems to need twice what it was foretold to."""

    def mapped_mib() -> float:
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index("RssFile:") + 1]) / 1024

    monkeypatch.setattr(holding, "free_memory", lambda: 1 << 40)
    monkeypatch.setattr(holding, "_READ_BYTES", 1 << 22)
    array = np.load(stored, mmap_mode="r")
    before = mapped_mib()
    held = hold_features({"vision": array}, CPU)
    assert mapped_mib() - before < 16
    rows = held.rows["vision"]
    assert isinstance(rows, torch.Tensor) and bool((rows == 1).all())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_several_processes_share_what_one_would_copy(stored: Path) -> None:
    """And find all of its pages in their map: reading takes hardly a fault."""
    place, taken, _, total = held_by(stored, 1)
    assert place == "in memory" and taken > 60
    if not holding._map_at_once(np.load(stored, mmap_mode="r")):
        pytest.skip("this kernel cannot fill a map at once")
    place, taken, faults, shared = held_by(stored, 8)
    assert place == "in memory, shared by 8 processes"
    assert taken < 8 and faults < 1000  # of 16,384 pages
    assert shared == total == 512 * 64


def test_where_a_map_cannot_be_filled_copies_of_all_processes_must_fit(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.load(stored, mmap_mode="r")
    monkeypatch.setattr(holding, "_map_at_once", lambda array: False)
    monkeypatch.setattr(holding, "free_memory", lambda: 10 * array.nbytes)
    assert hold_features({"vision": array}, CPU, processes=2).place == "in memory"
    assert hold_features({"vision": array}, CPU, processes=3).place == "on disk, memory-mapped"
