"""Keypoint tokens against patch tokens in a StateVLA: a training step, and one decision.

Both policies come from one recipe, with and without its ``keypoints``; frozen features, states and
actions are random, on which no time depends. Every round measures both, in turn and in changing
order, so that whatever else the machine does hits both alike. Prints markdown, writes JSON.

    python benchmarks/keypoint_tokens.py [--rounds 15] [--threads 1] [--output keypoint_tokens.json]

``train step`` is one optimiser step of the recipe's objective on features that are in memory, as in
a run after its features are computed. ``decision`` turns features into a chunk; ``decision with
images`` runs the frozen vision backbone first, as a server does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action, libero_cameras
from reflexarc.policy.devices import resolve_device
from reflexarc.policy.interface import Task
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.training.config import Recipe
from reflexarc.training.config_objectives import FlowMatchingConfig
from reflexarc.training.families import build_policy
from reflexarc.training.objective import Batch
from reflexarc.training.objectives.flow_matching import FlowMatchingObjective
from reflexarc.training.optimization import make_optimizer
from reflexarc.training.recipe_files import load_recipe

INSTRUCTION = "pick up the alphabet soup and place it in the basket"
WAYS = ("patches", "keypoints")
MEASURES = ("train step", "decision", "decision with images")


class Arm:
    """One policy with its optimiser, and what is measured of it."""

    def __init__(self, recipe: Recipe, batch_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.policy = make_policy(recipe).to(device)
        self.objective = make_objective(recipe)
        self.optimizer = make_optimizer(self.policy, recipe.optimizer)
        self.clip = recipe.optimizer.gradient_clip
        self.batch = self.random_batch(batch_size)
        self.one = self.random_batch(1)
        self.images = {
            name: torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, device=device)
            for name in self.policy.contract.camera_names
        }

    def random_batch(self, rows: int) -> Batch:
        policy, contract = self.policy, self.policy.contract
        patches = policy.vision.grid(224, 224)
        cells = patches[0] * patches[1]
        actions = torch.randn(rows, contract.action.horizon, contract.action.dimension)
        actions[..., -1] = actions[..., -1].sign()
        vision = torch.randn(rows, 1, len(contract.cameras), cells, policy.vision.channels)
        with torch.inference_mode():
            language = policy.embed_task([Task(instruction=INSTRUCTION)])["language"]
        batch = Batch(
            window={"vision": vision, "state": torch.randn(rows, 1, contract.state.dimension)},
            task={"language": language.cpu().clone().expand(rows, -1)},
            valid=torch.ones(rows, 1, dtype=torch.bool),
            actions=actions,
            action_mask=torch.ones(rows, contract.action.horizon, dtype=torch.bool),
        )
        return batch.to(policy.device)

    def train_step(self) -> None:
        self.policy.train()
        draws = self.objective.draw(self.batch, torch.Generator().manual_seed(0))
        draws = {name: rows.to(self.policy.device) for name, rows in draws.items()}
        loss = self.objective(self.policy, self.batch, draws)["total"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip or float("inf"))
        self.optimizer.step()

    def decide(self, vision: Tensor | None = None) -> None:
        self.policy.eval()
        batch, sampling = self.one, self.policy.sampling
        assert sampling.noise_shape is not None
        noise = torch.randn(1, *sampling.noise_shape, device=self.policy.device)
        window = batch.window if vision is None else {**batch.window, "vision": vision}
        with torch.inference_mode():
            context = self.policy.encode(batch.task, window, batch.valid)
            self.policy.sample_actions(context, noise, steps=sampling.default_steps)

    def decide_with_images(self) -> None:
        self.policy.eval()
        with torch.inference_mode():
            self.decide(self.policy.embed_frames(self.images, self.one.task)["vision"][:, None])

    def measures(self) -> dict[str, Callable[[], None]]:
        ways = (self.train_step, self.decide, self.decide_with_images)
        return dict(zip(MEASURES, ways, strict=True))

    def describe(self) -> dict[str, Any]:
        tokenizer = self.policy.representation.tokenizer
        cameras = len(self.policy.contract.cameras)
        return {
            "tokens": 2 + cameras * tokenizer.vision.tokens + self.policy.config.latent_tokens,
            "trained_parameters": sum(self.policy.component_parameters().values()),
        }


def make_policy(recipe: Recipe) -> StateVLA:
    parts = recipe.contract
    contract = PolicyContract(
        family=recipe.family,
        cameras=libero_cameras(224, 256),
        state=LIBERO_STATES[parts.state_layout],
        action=libero_action(parts.horizon),
    )
    policy = build_policy(recipe, contract, [INSTRUCTION])
    assert isinstance(policy, StateVLA)
    return policy


def make_objective(recipe: Recipe) -> FlowMatchingObjective:
    if not isinstance(recipe.objective, FlowMatchingConfig):
        raise SystemExit("the recipe must train by flow_matching; give a --stage that does")
    return FlowMatchingObjective(recipe.objective, gripper_index=6)


def milliseconds(call: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Mean of ``repeats`` calls, the device's work included."""
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return (time.perf_counter() - started) * 1000 / repeats


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(arms: dict[str, Arm], rounds: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """``{measure: {way: milliseconds of every round}}``."""
    device = arms[WAYS[0]].policy.device
    calls = {way: arm.measures() for way, arm in arms.items()}
    for name in MEASURES:  # nobody's first call, which fills caches
        for way in WAYS:
            milliseconds(calls[way][name], 1, device)
    times: dict[str, dict[str, list[float]]] = {
        name: {way: [] for way in WAYS} for name in MEASURES
    }
    for index in range(rounds):
        order = WAYS if index % 2 == 0 else WAYS[::-1]
        for name in MEASURES:
            for way in order:
                times[name][way].append(
                    milliseconds(calls[way][name], 1 if name == "train step" else repeats, device)
                )
    return times


def summarize(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians, and the quartiles of the rounds' own ratios of patches to keypoints."""
    summary = {}
    for name, of_way in times.items():
        ratios = [a / b for a, b in zip(of_way["patches"], of_way["keypoints"], strict=True)]
        medians = {way: statistics.median(values) for way, values in of_way.items()}
        quartiles = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        summary[name] = {
            "median_ms": medians,
            "ratio": medians["patches"] / medians["keypoints"],
            "ratio_quartiles": [quartiles[0], quartiles[2]],
        }
    return summary


def describe_machine(device: torch.device) -> dict[str, Any]:
    names = [platform.processor() or platform.machine()]
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        found = [line for line in cpu_info.read_text().splitlines() if "model name" in line]
        names = [line.split(":")[1].strip() for line in found] or names
    return {
        "processor": names[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_markdown(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(
        f"{report['recipe']}, batch {report['batch_size']}, {report['rounds']} rounds · "
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, torch "
        f"{machine['torch']}, load {machine['load'][0]}\n"
    )
    for way, facts in report["ways"].items():
        print(f"- {way}: {facts['tokens']} tokens, {facts['trained_parameters']:,} parameters")
    print("\n| | patches, median ms | keypoints, median ms | ratio | quartiles of the ratio |")
    print("|---|---:|---:|---:|---:|")
    for name, found in report["measures"].items():
        low, high = found["ratio_quartiles"]
        print(
            f"| {name} | {found['median_ms']['patches']:.1f} | "
            f"{found['median_ms']['keypoints']:.1f} | {found['ratio']:.2f} | "
            f"{low:.2f} to {high:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="statevla_none_libero_object_small")
    parser.add_argument("--stage", type=int, help="of a recipe that has stages")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5, help="decisions a round and way")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    recipe = load_recipe(options.recipe, stage=options.stage)
    if recipe.policy.get("keypoints") is None:
        raise SystemExit(f"{options.recipe} has no keypoints to compare with")
    plain = recipe.model_copy(update={"policy": {**recipe.policy, "keypoints": None}})
    batch_size = options.batch_size or recipe.training.batch_size
    recipes = dict(zip(WAYS, (plain, recipe), strict=True))
    arms = {way: Arm(of_way, batch_size, device) for way, of_way in recipes.items()}
    times = measure(arms, options.rounds, options.repeats)
    report = {
        "recipe": recipe.name,
        "batch_size": batch_size,
        "rounds": options.rounds,
        "repeats": options.repeats,
        "ways": {way: arm.describe() for way, arm in arms.items()},
        "measures": summarize(times),
        "milliseconds": times,
        "machine": describe_machine(device),
    }
    print_markdown(report)
    if options.output is not None:
        temporary = options.output.with_name(f".{options.output.name}.tmp")
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        temporary.replace(options.output)


if __name__ == "__main__":
    main()
