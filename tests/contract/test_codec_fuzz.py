"""20,000 mutated frames in a process of its own: a crash or a hang fails the test, not the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FRAMES = 20_000


def test_mutated_frames_raise_nothing_but_codec_errors() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.contract.fuzz_codec", "--frames", str(FRAMES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    summary = result.stdout.splitlines()[-1]
    assert summary.startswith(f"{FRAMES} frames of seed 0: ")
    decoded = int(summary.split(": ")[1].split()[0])
    assert FRAMES // 10 < decoded < FRAMES * 9 // 10  # mutations both break frames and spare some
