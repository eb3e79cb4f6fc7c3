"""What the trainer costs beyond forward, backward and optimiser.

The policy of ``statevla_none_libero_object_small`` on random features in memory. The trainer makes
its steps as in a run: batches gathered by index, draws, learning rate, gradient norms by module,
clocks, log lines into ``metrics.jsonl``, ``train.log`` and TensorBoard. Beside it a bare loop
computes one batch that lies there already, with the same modules, optimiser and averages. Rounds of
both alternate in changing order, so that whatever else the machine does hits both alike.

    python benchmarks/trainer_overhead.py [--rounds 12] [--steps 20] [--threads 1]

Prints markdown, writes JSON with ``--output``. ``measured`` is the median over rounds of the
trainer's time against the bare loop's; ``by its clock`` the share of a step that the trainer itself
counts as neither forward, backward nor optimiser.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from keypoint_tokens import INSTRUCTION, make_objective, make_policy
from torch import nn
from tqdm import tqdm

from reflexarc.contract import NormalizationStatistics
from reflexarc.policy.devices import resolve_device
from reflexarc.policy.interface import Task
from reflexarc.policy.processing import Processor
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.training.config import Recipe
from reflexarc.training.optimization import AveragedWeights, make_optimizer
from reflexarc.training.recipe_files import load_recipe
from reflexarc.training.reporting import open_reporters
from reflexarc.training.run_folder import RunFolder
from reflexarc.training.samples import BatchSource, SampleTable
from reflexarc.training.step_clock import PARTS
from reflexarc.training.trainer import Trainer

RECIPE = "statevla_none_libero_object_small"


class BareLoop:
    """Forward, backward, optimiser and averages on one batch; nothing else."""

    def __init__(self, recipe: Recipe, source: BatchSource, device: torch.device) -> None:
        self.policy, self.objective = seeded_policy(recipe, device), make_objective(recipe)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.policy, recipe.optimizer)
        self.averaged = AveragedWeights(self.policy, recipe.training.ema_decay or 0.995)
        self.clip = recipe.optimizer.gradient_clip or float("inf")
        self.batch = source.batch(torch.arange(recipe.training.batch_size)).to(device)
        draws = self.objective.draw(self.batch, torch.Generator().manual_seed(0))
        self.draws = {name: values.to(device) for name, values in draws.items()}
        self.policy.train()

    def steps(self, count: int) -> None:
        for step in range(count):
            losses = self.objective(self.policy, self.batch, self.draws)
            self.optimizer.zero_grad(set_to_none=True)
            losses["total"].backward()
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self.optimizer.step()
            self.averaged.update(step + 1)


class WholeTrainer:
    """The trainer's own loop, some steps at a time."""

    def __init__(
        self, recipe: Recipe, source: BatchSource, device: torch.device, folder: Path
    ) -> None:
        run = RunFolder(folder)
        self.trainer = Trainer(
            recipe,
            seeded_policy(recipe, device),
            make_objective(recipe).to(device),
            source,
            None,
            cast(Processor, None),  # for validation and checkpoints, of which there are none
            cast(NormalizationStatistics, _NoStatistics()),
            {},
            run,
        )
        self.trainer._reporter = open_reporters(run, recipe)
        self.trainer._training_mode()
        self.bar = tqdm(disable=True)
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def steps(self, count: int) -> None:
        trainer = self.trainer
        trainer._restart_clocks()
        for _ in range(count):
            trainer._step(trainer.progress.step)
            trainer.progress.step += 1
            trainer._after_step(self.bar)


class _NoStatistics:
    dataset_fingerprint = ""


def seeded_policy(recipe: Recipe, device: torch.device) -> StateVLA:
    torch.manual_seed(0)
    return make_policy(recipe).to(device)


def random_source(recipe: Recipe, frames: int) -> BatchSource:
    """Samples of a recipe with random features, float16 as in the store."""
    policy = seeded_policy(recipe, torch.device("cpu"))
    contract = policy.contract
    rows, columns = policy.vision.grid(224, 224)
    actions = torch.randn(frames, contract.action.horizon, contract.action.dimension)
    actions[..., -1] = actions[..., -1].sign()
    vision = torch.randn(frames, len(contract.cameras), rows * columns, policy.vision.channels)
    samples = SampleTable(
        state=torch.randn(frames, 1, contract.state.dimension),
        actions=actions,
        action_mask=torch.ones(frames, contract.action.horizon, dtype=torch.bool),
        frame_row=torch.arange(frames)[:, None],
        valid=torch.ones(frames, 1, dtype=torch.bool),
        task_row=torch.zeros(frames, dtype=torch.int64),
    )
    with torch.inference_mode():
        task = policy.embed_task([Task(instruction=INSTRUCTION)])
    rows_of_task = {name: values.clone() for name, values in task.items()}
    return BatchSource(samples, {"vision": vision.half()}, rows_of_task)


def timed(call: Callable[[int], None], steps: int, device: torch.device) -> float:
    """Seconds a step: of all threads of the process on a CPU, so that others do not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    began = clock()
    call(steps)
    wait(device)
    return (clock() - began) / steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares_by_clock(metrics: Path) -> dict[str, float]:
    """Share of each part in a step, from the lines that the trainer wrote but the first."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
    means = {p: statistics.mean(line[f"time/{p}"] for line in lines) for p in PARTS}
    return {part: value / sum(means.values()) for part, value in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    longest = [f"training.{key}=1000000" for key in ("steps", "validate_every", "checkpoint_every")]
    recipe = load_recipe(RECIPE, ["training.epochs=null", *longest])
    source = random_source(recipe, options.frames)
    with tempfile.TemporaryDirectory() as folder:
        bare = BareLoop(recipe, source, device)
        whole = WholeTrainer(recipe, source, device, Path(folder))
        ways = {"bare": bare.steps, "trainer": whole.steps}
        rounds = []
        for number in range(options.rounds + 1):
            order = list(ways) if number % 2 else list(reversed(ways))
            times = {name: timed(ways[name], options.steps, device) for name in order}
            if number:  # the first warms both up
                rounds.append(times)
        shares = shares_by_clock(Path(folder) / "metrics.jsonl")
    ratios = [times["trainer"] / times["bare"] - 1 for times in rounds]
    result = {
        "recipe": RECIPE,
        "device": str(device),
        "threads": options.threads,
        "bare_ms": 1000 * statistics.median(times["bare"] for times in rounds),
        "trainer_ms": 1000 * statistics.median(times["trainer"] for times in rounds),
        "overhead": statistics.median(ratios),
        "overhead_of_rounds": sorted(ratios),
        "shares_by_clock": shares,
    }
    beyond = shares["data"] + shares["other"]
    unit = "CPU ms" if device.type == "cpu" else "ms"
    print(f"| | {unit} a step |\n|---|---|")
    print(f"| bare loop | {result['bare_ms']:.1f} |\n| trainer | {result['trainer_ms']:.1f} |\n")
    print(f"measured: {100 * statistics.median(ratios):+.1f} % (rounds {100 * min(ratios):+.1f} to "
          f"{100 * max(ratios):+.1f} %); by its clock: {100 * beyond:.1f} % "
          f"(data {100 * shares['data']:.1f} %, other {100 * shares['other']:.1f} %)")  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
