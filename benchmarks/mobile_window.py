"""What a kept window saves: one new frame a decision against the whole window of 8.

    python benchmarks/mobile_window.py [--ckpt DIR] [--kosmos DIR] [--rounds 30]

Both sides answer the same decisions with the same policy, in turns: one keeps its session, the
other sends its window whole. Without `--ckpt` the policy is the compact one with random weights;
`--kosmos` takes a folder of Kosmos-2 instead (a small random one shows the same ratio of calls).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reflexarc.contract import (
    Camera,
    FeatureStatistics,
    NormalizationStatistics,
    Observation,
    PolicyContract,
)
from reflexarc.contract.messages import HistoryRow
from reflexarc.contract.policy_contract import ActionSpec, History, StateSpec
from reflexarc.policy.checkpoint import LoadedPolicy, load_checkpoint
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.mobile_vla.config import CompactConfig, Kosmos2Config, MobileVLAConfig
from reflexarc.policy.mobile_vla.model import MobileVLA
from reflexarc.policy.processing import Processor
from reflexarc.policy.runtime import PolicyRuntime

TOLD = "navigate to the red box"
FRAMES = 8
VELOCITY = ActionSpec(
    names=("linear_x", "linear_y"), horizon=10, kind="velocity", control_hz=5.0,
    low=(-0.6, -0.6), high=(0.6, 0.6),
)  # fmt: skip


def random_policy(kosmos: Path | None) -> LoadedPolicy:
    size = 224
    if kosmos is not None:
        import json

        size = json.loads((kosmos / "config.json").read_text())["vision_config"]["image_size"]
    camera = Camera(name="front", height=size, width=size, orientation="upright",
                    source_height=size, source_width=size)  # fmt: skip
    contract = PolicyContract(
        family="mobile_vla", cameras=(camera,), state=StateSpec(layout="none", names=()),
        history=History(frames=FRAMES), action=VELOCITY,
    )  # fmt: skip
    told = LanguageEmbeddings([TOLD, "drive"], torch.randn(2, 384), "random")
    backbone = CompactConfig() if kosmos is None else Kosmos2Config(path=str(kosmos))
    config = MobileVLAConfig(backbone=backbone, lstm_hidden=256, head_hidden=(256,))
    policy = MobileVLA(config, contract, told if kosmos is None else None)
    policy.requires_grad_(False).eval()
    rows = np.random.default_rng(0).uniform(-0.6, 0.6, (50, 2))
    stats = NormalizationStatistics(
        state=FeatureStatistics.from_rows(np.zeros((4, 0)), ()),
        action=FeatureStatistics.from_rows(rows, VELOCITY.names),
        dataset_fingerprint="",
    )
    return LoadedPolicy(policy, stats, Processor(contract, stats), {}, "", Path())


class Side:
    """A runtime that counts the frames which pass through the backbone."""

    def __init__(self, loaded: LoadedPolicy) -> None:
        self.runtime, self.frames, self.seconds = PolicyRuntime(loaded), 0, list[float]()

    def decide(self, observation: Observation, counter: list[int]) -> np.ndarray[Any, Any]:
        before, began = counter[0], time.perf_counter()
        chunk = self.runtime.infer([observation])[0]
        self.seconds.append(time.perf_counter() - began)
        self.frames += counter[0] - before
        return chunk.actions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--kosmos", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_checkpoint(options.ckpt) if options.ckpt else random_policy(options.kosmos)
    policy, counter = loaded.policy, [0]
    assert isinstance(policy, MobileVLA)
    told = TOLD if policy.backbone.language is None else policy.backbone.language.instructions[0]
    encode = policy.backbone.image_rows

    def counted(images: torch.Tensor) -> torch.Tensor:
        counter[0] += len(images)
        return encode(images)

    policy.backbone.image_rows = counted  # type: ignore[method-assign]
    size = policy.contract.cameras[0].height
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (size, size, 3), np.uint8)
              for _ in range(options.rounds + FRAMES)]  # fmt: skip
    kept, whole, worst = Side(loaded), Side(loaded), 0.0
    state = np.zeros(0, np.float32)
    for step, image in enumerate(images):
        seen = {"images": {"front": image}, "state": state, "instruction": told, "seed": 0,
                "step_index": step}  # fmt: skip
        rows = tuple(
            HistoryRow(past, state, {"front": images[past]})
            for past in range(max(0, step - FRAMES + 1), step)
        )
        if step == FRAMES - 1:  # full windows from here on
            kept.seconds, whole.seconds, kept.frames, whole.frames = [], [], 0, 0
        sides = [(kept, Observation(**seen, session_id="kept")),
                 (whole, Observation(**seen, history=rows))]  # fmt: skip
        found = [one.decide(asked, counter) for one, asked in (sides if step % 2 else sides[::-1])]
        worst = max(worst, float(np.abs(found[0] - found[1]).max()))
    decisions = len(kept.seconds)
    ratio = statistics.median(
        one / other for one, other in zip(kept.seconds, whole.seconds, strict=True)
    )
    name = type(policy.backbone).__name__
    print("| policy | side | frames encoded a decision | median ms | of the whole window |")
    print("|---|---|---:|---:|---:|")
    for title, side, share in (
        ("kept features", kept, f"{ratio:.3f}"),
        ("whole window", whole, "1"),
    ):
        middle = 1000 * statistics.median(side.seconds)
        print(f"| {name} | {title} | {side.frames / decisions:g} | {middle:.1f} | {share} |")
    print(f"\nlargest difference of an action: {worst:.1e} m/s; {decisions} decisions, in turns")


if __name__ == "__main__":
    main()
