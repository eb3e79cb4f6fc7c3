"""What one check found, and how a check asks another process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

Purpose = Literal["serve", "train", "sim"]
PURPOSES: tuple[Purpose, ...] = ("serve", "train", "sim")
EXTRA_OF: dict[Purpose, str] = {"serve": "server", "train": "train", "sim": "sim"}


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``note``, something that may slow down or surprise; ``broken``.
        said: what was found.
        mend: what to do about it; empty where nothing is to be done.
        needed_for: the purposes that a broken one stops; empty means whatever one wants to do.
    """

    name: str
    status: Literal["ok", "note", "broken"]
    said: str
    mend: str = ""
    needed_for: tuple[Purpose, ...] = ()

    def stops(self, purposes: tuple[Purpose, ...]) -> bool:
        asked = not self.needed_for or any(purpose in self.needed_for for purpose in purposes)
        return self.status == "broken" and asked


def ask_python(script: str, timeout: float) -> dict[str, Any]:
    """Run a script that prints one JSON map as its last line; in a process of its own.

    What crashes, hangs or prints something else comes back as ``{"error": what happened}``.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:g} s"}
    try:
        values = json.loads(done.stdout.strip().splitlines()[-1])
        if isinstance(values, dict):
            return values
    except (ValueError, IndexError):
        pass
    lines = done.stderr.strip().splitlines()
    said = lines[-1][:300] if lines else "it printed nothing"
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return {"error": f"ended with {ended}: {said}"}
