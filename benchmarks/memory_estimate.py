"""The memory that ``--dry-run`` foretells beside what a training process takes at its most.

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --recipe NAME --train-data DIR --feature-cache DIR

Each run is a process of its own: it estimates, trains three steps, and reads its peak (Linux's
VmHWM). A small process's own memory would hide an error, so activations are compared too: what the
peak rises by from the smallest batch to a larger one, measured and foretold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from reflexarc.data.generated import GeneratedSettings, write_generated

MIB = 2**20
RECIPES = {
    "debug_statevla": [],
    "debug_statevla, wider": ["policy.d_model=128", "policy.encoder_layers=4"],
    "debug_statevla_masked": [],
    "debug_qwen_geometry": [],
}
CHANGES = {
    "fp32": [],
    "bf16": ["training.precision=bf16"],
    "recomputed": ["training.activation_checkpointing=true"],
}


def one(recipe: str, data: Path, folder: Path, overrides: list[str], cache: Path | None) -> None:
    """In a process of its own: estimate, train three steps, print both as JSON."""
    import torch

    from reflexarc.training.recipe_files import load_recipe
    from reflexarc.training.session import execute, open_run_folder, plan

    torch.set_num_threads(1)
    fixed = [f"data.paths=['{data}']", "training.epochs=null", "training.steps=3",
             "training.validate_every=1000", "training.checkpoint_every=1000",
             "training.log_every=1", "data.validation_fraction=0"]  # fmt: skip
    loaded = load_recipe(recipe, [*fixed, *overrides])
    planned = plan(loaded, folder / "run", device=torch.device("cpu"), feature_cache=cache)
    found = planned.estimate
    execute(planned, open_run_folder(loaded, folder / "run", resume=False, fresh=True),
            progress_bar=False)  # fmt: skip
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    print(json.dumps({"foretold": found.memory.total, "peak": peak, "rows": found.rows}))


def measured(
    name: str, data: Path, overrides: list[str], cache: Path | None = None
) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", name.split(",")[0], "--data", str(data),
                   "--folder", folder, *overrides]  # fmt: skip
        command += [] if cache is None else ["--feature-cache", str(cache)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        ).stdout
        found: dict[str, int] = json.loads(output.splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256, 512])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help="only this one, on --train-data, with its own batch")
    parser.add_argument("--train-data", type=Path)
    parser.add_argument("--feature-cache", type=Path, help="with the features of that recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.one:
        one(given.one, given.data, given.folder, given.overrides, given.feature_cache)
        return
    if given.recipe:
        if given.train_data is None:
            parser.error("--recipe needs --train-data")
        found = measured(given.recipe, given.train_data, given.overrides, given.feature_cache)
        foretold, peak = found["foretold"], found["peak"]
        print(f"{given.recipe}, {found['rows']} samples at once: foretold {foretold / MIB:,.0f} "
              f"MiB, peak {peak / MIB:,.0f} MiB, ratio {foretold / peak:.3f}")  # fmt: skip
        return
    print("| recipe | | batch | foretold MiB | peak MiB | rise foretold | rise measured | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_generated(data, GeneratedSettings(tasks=2, episodes=24))
        for name, policy in RECIPES.items():
            for change, keys in CHANGES.items():
                first: dict[str, int] = {}
                for batch in given.batches:
                    found = measured(name, data, [*policy, *keys, f"training.batch_size={batch}"])
                    first = first or found
                    line = [name, change, str(found["rows"])]
                    line += [f"{found[key] / MIB:,.0f}" for key in ("foretold", "peak")]
                    rises = [(found[k] - first[k]) / MIB for k in ("foretold", "peak")]
                    if found is not first:
                        line += [*(f"{rise:,.1f}" for rise in rises), f"{rises[0] / rises[1]:.2f}"]
                    print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
