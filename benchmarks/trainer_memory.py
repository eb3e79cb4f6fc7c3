"""Memory of the trainer over time: it must be flat.

    python benchmarks/trainer_memory.py [--minutes 60] [--recipe debug_statevla] [--output FILE]

Trains a small recipe on generated demonstrations, with features from the memory map, validation
and checkpoints every so often, and reads the process's resident memory once a second: all of it,
and what is its own (without mapped files). After the minutes it stops the run as a user would, by
SIGTERM. Prints markdown, writes JSON. The slope is a least-squares line over what follows the
first half, in MiB an hour.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import OUTPUTS, describe_machine, write_json

from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.policy.memory import keep_freed_memory
from reflexarc.training.feature_store import holding
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan

_SHOWN = 10


class Watch(threading.Thread):
    """Reads the memory once a second, and stops the run at the end."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds = seconds
        self.samples: list[tuple[float, float, float]] = []

    def run(self) -> None:
        process, began = psutil.Process(), time.monotonic()
        while (elapsed := time.monotonic() - began) < self.seconds:
            memory = process.memory_info()
            own = memory.rss - getattr(memory, "shared", 0)  # mapped files count as shared
            self.samples.append((elapsed, memory.rss / 2**20, own / 2**20))
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)


def train(recipe_name: str, seconds: float, folder: Path) -> tuple[Watch, int]:
    """Train until the time is over; returns the readings and the number of steps."""
    write_generated(folder / "data", GeneratedSettings())
    recipe = load_recipe(
        recipe_name,
        [f"data.paths=['{folder / 'data'}']", "training.epochs=null", "training.steps=100000000",
         "training.validate_every=200", "training.checkpoint_every=200", "training.log_every=20"],
    )  # fmt: skip
    holding.free_memory = lambda: 0  # so that features stay on the disk, memory-mapped
    device = torch.device("cpu")
    planned = plan(recipe, folder / "run", device=device, feature_cache=folder / "features")
    run = open_run_folder(recipe, folder / "run", resume=False, fresh=False)
    watch = Watch(seconds)
    watch.start()
    outcome = execute(planned, run, progress_bar=False, log=print)
    watch.join()
    return watch, outcome.steps_run


def slope(samples: np.ndarray[Any, np.dtype[np.float64]], column: int) -> float:
    """MiB an hour, over what follows the first half."""
    later = samples[samples[:, 0] > 0.5 * samples[-1, 0]]
    return float(np.polyfit(later[:, 0], later[:, column], 1)[0] * 3600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--recipe", default="debug_statevla")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUTS) as folder:
        watch, steps = train(options.recipe, 60 * options.minutes, Path(folder))
    samples = np.array(watch.samples)
    print(f"\n{describe_machine()}; {options.recipe}, {steps:,} steps\n")
    print("| minutes | resident MiB | own MiB |\n|---:|---:|---:|")
    for seconds, resident, own in samples[np.linspace(0, len(samples) - 1, _SHOWN).astype(int)]:
        print(f"| {seconds / 60:.1f} | {resident:,.1f} | {own:,.1f} |")
    later = samples[samples[:, 0] > 0.5 * samples[-1, 0]]
    result = {
        "recipe": options.recipe,
        "steps": steps,
        "minutes": options.minutes,
        "resident_mib_per_hour": slope(samples, 1),
        "own_mib_per_hour": slope(samples, 2),
        "growth_after_first_half_mib": float(later[-1, 1] - later[0, 1]),
        "samples": samples[:: max(1, len(samples) // 600)].round(2).tolist(),
    }
    growth = result["growth_after_first_half_mib"]
    print(
        f"\nslope: resident {result['resident_mib_per_hour']:+.2f}, own "
        f"{result['own_mib_per_hour']:+.2f} MiB an hour; {growth:+.2f} MiB after the first half"
    )
    print(f"written: {write_json('trainer_memory', result, options.output)}")


if __name__ == "__main__":
    main()
