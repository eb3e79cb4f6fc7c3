"""Training of the V-JEPA 2 head from the feature store against encoding in every step.

Both sides train the same decoder on the same samples, in turns; one reads tokens of clips and goals
from the store, the other reads frames and runs the frozen encoder. Prints a table in Markdown.

    python benchmarks/vjepa2_head_store.py --encoder efficientnet
    python benchmarks/vjepa2_head_store.py --encoder vit_l --batch 1 --rounds 1   # random weights
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reflexarc.data.generated import GeneratedSettings, write_generated
from reflexarc.training.feature_store.dtypes import to_stored
from reflexarc.training.feature_store.embedding import embed_episode
from reflexarc.training.goals import goal_task
from reflexarc.training.objective import Batch
from reflexarc.training.preparation import Preparation, prepare
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.samples import BatchSource, seeded_generator

TINY = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
SIZES: dict[str, dict[str, object]] = {
    "tiny": TINY,
    "vit_l": {},
    "vit_g": {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22,
              "mlp_ratio": 48 / 11},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", choices=["efficientnet", *SIZES], default="efficientnet")
    parser.add_argument("--batch", type=int, default=4, help="samples a step, on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        preparation = make(Path(folder), options.encoder, torch.device(options.device))
        measure(preparation, Path(folder), options.batch, options.rounds, options.encoder)


def make(folder: Path, encoder: str, device: torch.device) -> Preparation:
    """The recipe for a CPU, or the full-size one, on a few made-up demonstrations."""
    settings = GeneratedSettings(tasks=1, episodes=2, steps=16, render_every=1, image_size=256)
    write_generated(folder / "data", settings)
    overrides = [f"data.paths=['{folder / 'data'}']", "data.validation_fraction=0.5"]
    if encoder == "efficientnet":
        name = "vjepa2_head_libero_spatial_small"
    else:
        name = "vjepa2_head_libero_spatial"
        precision = "bf16" if device.type == "cuda" else "fp32"
        overrides.append(f"policy.clips.path={save_random(folder / 'encoder', encoder)}")
        overrides.append(f"policy.clips.precision={precision}")
    return prepare(load_recipe(name, overrides), device)


def save_random(folder: Path, size: str) -> Path:
    """A V-JEPA 2 of this size with random weights, as a user's folder would be."""
    from safetensors.torch import save_file
    from transformers import VJEPA2Config

    from reflexarc.policy.backbones.vjepa2 import build_encoder

    config = VJEPA2Config(**SIZES[size])  # type: ignore[arg-type]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    weights = build_encoder(config.to_dict()).state_dict()
    named = {f"encoder.{key}": tensor.contiguous() for key, tensor in weights.items()}
    save_file(named, folder / "model.safetensors")
    return folder


def measure(preparation: Preparation, folder: Path, batch: int, rounds: int, encoder: str) -> None:
    source = stored_source(preparation, folder)
    optimizer = torch.optim.AdamW([p for p in preparation.policy.parameters() if p.requires_grad])
    random = np.random.default_rng(0)

    def step(make_batch: Callable[[Tensor], Batch]) -> float:
        rows = torch.from_numpy(random.integers(len(source), size=batch))
        began = time.perf_counter()
        train(preparation, make_batch(rows), optimizer)
        if preparation.policy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def encoded(rows: Tensor) -> Batch:
        return encoded_batch(preparation, source, rows)

    step(source.batch)
    times: dict[str, list[float]] = {"store": [], "encoding": []}
    for _ in range(rounds):
        times["store"].append(step(source.batch))
        times["encoding"].append(step(encoded))
    rates = {name: batch / statistics.median(values) for name, values in times.items()}
    print(f"\nencoder {encoder}, {preparation.policy.device}, batches of {batch}\n")
    print("| side | samples/s | median step (s) | min to max (s) |\n|---|---:|---:|---:|")
    for name, values in times.items():
        print(
            f"| {name} | {rates[name]:.2f} | {statistics.median(values):.3f} | "
            f"{min(values):.3f} to {max(values):.3f} |"
        )
    ratio = rates["store"] / rates["encoding"]
    print(f"\nfrom the store {ratio:.1f} times as many samples a second")


def stored_source(preparation: Preparation, folder: Path) -> BatchSource:
    """Samples whose rows lie on the disk as the store's do; random numbers, on which no time
    depends.
    """
    (episode,) = preparation.train_episodes
    frames = len(episode.image_steps)
    arrays = {}
    for name, row in embed_episode(preparation.policy, episode, np.zeros(1, np.int64)).items():
        rows = to_stored(torch.randn(frames, *row.shape[1:]), "bf16", name)
        np.save(folder / f"{name}.npy", rows)
        arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    task = preparation.task_of(episode)
    samples = preparation.samples([episode], [0])
    samples = replace(samples, task_row=torch.zeros_like(samples.task_row))
    return BatchSource(samples, arrays, task)


def encoded_batch(preparation: Preparation, source: BatchSource, rows: Tensor) -> Batch:
    """The same samples, their frames and goals read and encoded now."""
    stored = source.batch(rows)
    (episode,) = preparation.train_episodes
    policy = preparation.policy
    parts = [embed_episode(policy, episode, np.array([int(row)])) for row in rows]
    clips = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    with torch.no_grad():
        goals = [policy.embed_task([goal_task(policy, episode)]) for _ in rows]
    task = {name: torch.cat([goal[name] for goal in goals]) for name in goals[0]}
    return replace(stored, window={**clips, "state": stored.window["state"]}, task=task)


def train(preparation: Preparation, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    policy, objective = preparation.policy, preparation.objective
    policy.train()
    objective.train()
    draws = objective.draw(batch, seeded_generator(0, "draws", 0))
    on_device = {name: drawn.to(policy.device) for name, drawn in draws.items()}
    optimizer.zero_grad(set_to_none=True)
    objective(policy, batch.to(policy.device), on_device)["total"].backward()
    optimizer.step()


if __name__ == "__main__":
    main()
