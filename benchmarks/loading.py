"""Samples a second of one core, from memory-mapped features, HDF5 and LeRobot videos.

    python benchmarks/loading.py [--rounds 15] [--no-lerobot] [--no-stall] [--output FILE]

Every round measures every way once, in changing order, each on samples of its own; ratios are
medians over rounds. What is counted is CPU time of the process, all its threads included, with
files in the page cache: so many samples a second one core prepares. Prints markdown, writes JSON.

- ``memcpy``: the bytes of as many stored rows, from one block of memory into another.
- ``features, mapped``: rows of the store out of the memory map; as many bytes.
- ``batch, mapped``: the whole batch of the trainer: float32 features, states, actions, masks.
- ``memcpy, float32``: the bytes of that batch's features.
- ``HDF5``, ``h264``, ``AV1``: frames of two cameras, 256 px, uint8, out of the files: a batch at
  once (``reflexarc.data.frames.read_frames``), in ``…, one by one`` a sample at a time.
- ``decoded frames, mapped``: the same pixels, decoded once into a memory map beforehand, as the
  feature store keeps them for policies that train on pixels. Nothing is decoded here: it says what
  shuffled training costs, not what reading a video costs.
- ``lerobot h264``, ``lerobot AV1``: the same samples of the same files by lerobot's dataset class,
  in an environment of its own (REFLEXARC_LEROBOT_ENV, or made anew under ``.conformance``). Its
  default decoder, torchcodec, needs FFmpeg's shared libraries on the library path; without them
  that way is skipped, and ``pyav`` remains.

lerobot's class has no call for a batch: its loaders ask for one sample after another, and so does
this. The stall is the share of a step of the demo recipe
that the trainer's clock (``time/data``) measures as waiting for the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import OUTPUTS, describe_machine, write_json
from loading_ways import (
    DECODED,
    ONE_BY_ONE,
    Ways,
    add_decoded,
    add_features,
    add_lerobot,
    add_readers,
    make_demonstrations,
)

from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.policy.memory import keep_freed_memory
from reflexarc.training.feature_store import holding
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.session import execute, open_run_folder, plan


def measure(ways: Ways, order: str, rounds: int) -> dict[str, list[float]]:
    """Samples a CPU second of every way, one figure a round."""
    random = np.random.default_rng(1)
    found: dict[str, list[float]] = {name: [] for name in ways.read}
    for number in range(-1, rounds):  # the first warms up
        for name in random.permutation(list(ways.read)):
            count, batch = ways.samples[name], ways.batch[name]
            if order == "shuffled":
                indices = random.permutation(count)[:batch]
            else:
                indices = np.arange(batch) + random.integers(0, count - batch)
            seconds = ways.read[name](indices)
            if number >= 0:
                found[name].append(batch / seconds)
    return found


def ratio(found: dict[str, list[float]], one: str, two: str) -> str:
    shares = [a / b for a, b in zip(found[one], found[two], strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def comparisons(names: list[str]) -> list[tuple[str, str]]:
    pairs = [("features, mapped", "memcpy"), ("batch, mapped", "memcpy, float32"),
             ("batch, mapped", "memcpy")]  # fmt: skip
    for name in names:
        if name.startswith("lerobot "):
            codec = name.split()[1]
            pairs += [(codec, name), (f"{codec}{ONE_BY_ONE}", name)]
            if "torchcodec" in name:
                pairs.append((DECODED, name))
    return pairs


def data_stall(folder: Path, steps: int) -> dict[str, dict[str, float]]:
    """Of the demo recipe on small generated data: where a step's time goes, and the share of data.

    Features are held in memory in one run, and read from the map in the other.
    """
    write_generated(folder / "stall", GeneratedSettings(episodes=6, image_size=256))
    recipe = load_recipe(
        "statevla_pilot_libero_object",
        [f"data.paths=['{folder / 'stall'}']", "data.tasks=[]", "training.epochs=null",
         f"training.steps={steps}", "training.log_every=5", "training.validate_every=100000",
         "training.checkpoint_every=100000"],
    )  # fmt: skip
    found, free = {}, holding.free_memory
    for name, unlimited in (("in memory", True), ("memory-mapped", False)):
        holding.free_memory = free if unlimited else lambda: 0
        output = folder / name
        planned = plan(
            recipe, output, device=torch.device("cpu"), feature_cache=folder / "feature_cache"
        )
        run = open_run_folder(recipe, output, resume=False, fresh=False)
        execute(planned, run, progress_bar=False)
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        train = [line for line in lines if line["kind"] == "train"][1:]  # the first warms up
        parts = {k: statistics.median(line[k] for line in train) for k in train[0] if "time/" in k}
        found[name] = {**parts, "share": parts["time/data"] / sum(parts.values())}
    holding.free_memory = free
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4096, help="of the feature store")
    parser.add_argument("--batch", type=int, default=64, help="samples a batch of features")
    parser.add_argument("--frames", type=int, default=16, help="samples a batch of frames")
    parser.add_argument("--lerobot", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stall", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stall-steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUTS) as name:
        folder, ways = Path(name), Ways()
        add_features(ways, folder, options.rows, options.batch)
        data = make_demonstrations(folder)
        add_readers(ways, data, options.frames)
        add_decoded(ways, data, options.frames, folder)
        skipped = ["lerobot's dataset class: not asked for"]
        if options.lerobot:
            skipped = add_lerobot(ways, data, options.frames, folder)
        print(f"{describe_machine()}, {options.rounds} rounds\n")
        for order in ("sequential", "shuffled"):
            found = measure(ways, order, options.rounds)
            result[order] = found
            print(f"| {order} | samples/s a core |\n|---|---:|")
            for way, rates in found.items():
                print(f"| {way} | {statistics.median(rates):,.0f} |")
            print(f"\n| {order}, ratio | median (quartiles) |\n|---|---:|")
            for one, two in comparisons(list(found)):
                print(f"| {one} / {two} | {ratio(found, one, two)} |")
            print()
        for reason in skipped:
            print(f"skipped: {reason}")
        if options.stall:
            result["stall"] = data_stall(folder, options.stall_steps)
            for place, parts in result["stall"].items():
                step = sum(v for k, v in parts.items() if k != "share")
                print(f"data stall, {place}: {parts['share']:.2%} of a step of {step:.3f} s")
    print(f"\nwritten: {write_json('loading', {**result, 'skipped': skipped}, options.output)}")


if __name__ == "__main__":
    main()
