"""Ways to run one decision on the CPU: eagerly, traced, compiled, ahead of time; interleaved.

    python benchmarks/inference_modes.py [--rounds 12] [--threads 1] [--modes traced,compiled,ahead]
        [--parts encode,sample,vision] [--cpu-time]

Sides of a table are measured in turn, in changing order, one decision each a round; a ratio is the
median over rounds of a side's time divided by the eager one's of the same round. Parts are
measured by themselves: ``vision`` (frames to features), ``encode`` (features to z) and ``sample``
(z to actions, 4 Euler steps). ``prepared`` is what a mode needs before its first decision.

``traced`` is ``torch.jit.trace`` and ``freeze``; ``compiled`` is ``torch.compile`` (inductor, which
needs a C++ compiler); ``ahead`` is ``torch.export`` and AOTInductor, a minute a part. These three
see the compiled scan through an operator of torch's library, which it is not otherwise.
``--cpu-time`` counts the process's processor time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch

import torch
from torch import Tensor, nn

from reflexarc.contract import PolicyContract
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action, libero_cameras
from reflexarc.policy.checkpoint import load_checkpoint
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.layers import mamba
from reflexarc.policy.layers.selective_scan import backend_for
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.model import StateVLA

PARTS = ("encode", "sample", "vision")
CPU = torch.device("cpu")
_CALLS = 5  # measured together
Call = Callable[..., Tensor]
Parts = dict[str, tuple[nn.Module, tuple[Tensor, ...]]]


@torch.library.custom_op("reflexarc_benchmark::scan", mutates_args=())
def scan_operator(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor
) -> Tensor:
    return backend_for(CPU).scan(u, delta, A, B, C, D, gate, True)


@scan_operator.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("reflexarc_benchmark::convolve", mutates_args=())
def convolve_operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return backend_for(CPU).convolve(x, weight, bias)


@convolve_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def use_operators(wanted: bool) -> None:
    """Let Mamba blocks call the operators above, or what they call otherwise."""
    if not wanted:
        mamba.selective_scan, mamba.causal_convolution = ORIGINAL
        return
    mamba.selective_scan = lambda u, delta, A, B, C, D, gate, softplus: scan_operator(
        u, delta, A, B, C, D, gate
    )
    mamba.causal_convolution = convolve_operator


ORIGINAL = (mamba.selective_scan, mamba.causal_convolution)


class Vision(nn.Module):
    def __init__(self, policy: StateVLA) -> None:
        super().__init__()
        self.vision = policy.vision

    def forward(self, images: Tensor) -> Tensor:
        return self.vision(images)


class Encode(nn.Module):
    def __init__(self, policy: StateVLA) -> None:
        super().__init__()
        self.representation = policy.representation

    def forward(self, language: Tensor, state: Tensor, vision: Tensor) -> Tensor:
        valid = torch.ones(len(state), 1, dtype=torch.bool)
        return self.representation(
            {"language": language}, {"state": state, "vision": vision}, valid
        )


class Sample(nn.Module):
    def __init__(self, policy: StateVLA) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        return self.policy.sample_actions({"z": z}, noise, steps=4)


def parts_of(policy: StateVLA) -> Parts:
    """Modules with inputs of one decision."""
    generator = torch.Generator().manual_seed(0)
    contract = policy.contract
    shape = (len(contract.cameras), contract.cameras[0].height, contract.cameras[0].width, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    features = policy.vision(images)[None, None]
    language = policy.language.vectors[:1]
    state = torch.randn(1, 1, contract.state.dimension, generator=generator)
    encode = Encode(policy)
    z = encode(language, state, features)
    noise = torch.randn(1, *policy.sampling.noise_shape, generator=generator)
    found: Parts = {
        "encode": (encode, (language, state, features)),
        "sample": (Sample(policy), (z, noise)),
    }
    if list(policy.vision.parameters()):
        found["vision"] = (Vision(policy), (images,))
    return found


def prepare(mode: str, module: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Call:
    """The module in a mode, called once."""
    if mode == "eager":
        call: Any = module
    elif mode == "traced":
        call = torch.jit.freeze(torch.jit.trace(module.eval(), inputs, check_trace=False))
    elif mode == "compiled":
        call = torch.compile(module, dynamic=False)
    else:
        exported = torch.export.export(module, inputs)
        path = folder / f"{type(module).__name__}.pt2"
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
        call = torch._inductor.aoti_load_package(str(path))
    for _ in range(3):
        call(*inputs)
    return call


def measure(
    name: str, parts: Parts, modes: list[str], rounds: int, clock: Callable[[], float]
) -> list[str]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part, (module, inputs) in parts.items():
            calls, prepared, failed = {}, {}, {}
            for mode in modes:
                use_operators(mode != "eager")
                began = time.perf_counter()
                try:
                    calls[mode] = prepare(mode, module, inputs, Path(folder))
                except Exception as error:
                    failed[mode] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                prepared[mode] = time.perf_counter() - began
            use_operators(False)
            expected = calls["eager"](*inputs)
            seconds = time_calls(calls, inputs, rounds, clock)
            for mode in modes:
                if mode in failed:
                    rows.append(f"| {name} | {part} | {mode} | {failed[mode]} | | | |")
                    continue
                both = zip(seconds[mode], seconds["eager"], strict=True)
                ratios = [one / two for one, two in both]
                use_operators(mode != "eager")
                difference = float((calls[mode](*inputs) - expected).abs().max())
                rows.append(
                    f"| {name} | {part} | {mode} | {statistics.median(seconds[mode]) * 1e3:.2f} | "
                    f"{statistics.median(ratios):.2f} | {prepared[mode]:.1f} | {difference:.1e} |"
                )
            use_operators(False)
    return rows


def time_calls(
    calls: dict[str, Call], inputs: tuple[Tensor, ...], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of a call, by mode and round."""
    seconds: dict[str, list[float]] = {mode: [] for mode in calls}
    order = list(calls)
    for number in range(rounds):
        order = order[1:] + order[:1] if number % 2 else order[::-1]
        for mode in order:
            use_operators(mode != "eager")
            calls[mode](*inputs)  # caches as a server finds them is another question
            began = clock()
            for _ in range(_CALLS):
                calls[mode](*inputs)
            seconds[mode].append((clock() - began) / _CALLS)
    return seconds


def published() -> StateVLA:
    """The published size with patches from scratch and random weights."""
    torch.manual_seed(0)
    contract = PolicyContract(
        family="statevla",
        cameras=libero_cameras(),
        state=LIBERO_STATES["joint7+fingers2"],
        action=libero_action(10),
    )
    config = StateVLAConfig(vision={"name": "conv2d", "channels": 256, "pool": 1})
    language = LanguageEmbeddings(["x"], torch.randn(1, 384), "random")
    return StateVLA(config, contract, language).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", default="traced,compiled")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    modes = ["eager", *(m for m in options.modes.split(",") if m != "eager")]
    print(f"One decision, {options.threads} threads, scan {backend_for(CPU).name}:\n")
    print("| policy | part | mode | ms | of eager | prepared, s | largest difference |")
    print("|---|---|---|---|---|---|---|")
    with torch.no_grad():
        demo = load_checkpoint(options.checkpoint, "cpu").policy
        assert isinstance(demo, StateVLA)
        for name, policy in (("demo", demo), ("published size", published())):
            clock = time.process_time if options.cpu_time else time.perf_counter
            parts = parts_of(policy)
            chosen = {part: parts[part] for part in options.parts.split(",") if part in parts}
            for row in measure(name, chosen, modes, options.rounds, clock):
                print(row, flush=True)


if __name__ == "__main__":
    main()
