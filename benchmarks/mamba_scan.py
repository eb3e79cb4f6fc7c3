"""Mamba's backends beside transformers' Mamba and a transformer encoder of the same depth.

Twelve layers of width 256 (the encoder of StateVLA) on 395 tokens: a forward pass of one row and a
training step (forward and backward) of four, on one thread and on all cores. Sides take turns in
changing order, so that whatever else the machine does hits all alike. ``transformers`` is
``MambaModel`` without its kernels; ``transformer encoder`` is ``torch.nn.TransformerEncoder`` (8
heads, 1024 hidden, 9.5 M parameters; in inference mode it takes torch's fused layers).

    python benchmarks/mamba_scan.py [--rounds 9] [--clock wall] [--output FILE]   # 3 minutes

On CUDA: Triton's scan against mamba_ssm's reference and kernel and a transformer on SDPA, 1 to 64
rows, where each is installed. Prints markdown; ``--clock cpu`` counts the process' CPU time, which
other processes disturb less.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does; before torch

import torch
from common import describe_machine, write_json
from torch import Tensor, nn
from tqdm import tqdm

from reflexarc.policy.layers.mamba import MambaStack
from reflexarc.policy.layers.selective_scan import ScanUnavailableError, selective_scan
from reflexarc.policy.layers.selective_scan.choice import VARIABLE, make

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "policy"))
from scan_reference import loop_scan, relative_error, scan_inputs

WIDTH, LAYERS, TOKENS = 256, 12, 395
BACKEND_SIDES = {"blocked": "blocked (torch)", "native": "native (C++)"}
Side = Callable[[], object]


def mamba_stack(device: str = "cpu") -> MambaStack:
    torch.manual_seed(0)
    return MambaStack(WIDTH, LAYERS).to(device)


def transformers_mamba() -> Callable[[Tensor], Tensor]:
    from transformers import MambaConfig, MambaModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = MambaConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=16, expand=2, conv_kernel=4,
        vocab_size=8, use_cache=False,
    )  # fmt: skip
    model = MambaModel(config)
    return lambda tokens: model(inputs_embeds=tokens).last_hidden_state


def transformer_encoder(device: str = "cpu") -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 8, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True
    )
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).to(device)


@contextmanager
def scanned_by(name: str) -> Iterator[None]:
    """``MambaStack`` with the backend of this name; ``loop`` is the formula as it reads."""
    if name != "loop":
        with patch.dict(os.environ, {VARIABLE: name}):
            yield
        return
    loop = patch("reflexarc.policy.layers.mamba.selective_scan", loop_scan)
    with patch.dict(os.environ, {VARIABLE: "blocked"}), loop:
        yield


def cpu_sides() -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Title to the backend it forces (or "auto") and the model."""
    stack = mamba_stack()
    sides: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "transformers": ("auto", transformers_mamba()),
        "plain loop": ("loop", stack),
    }
    for name, title in BACKEND_SIDES.items():
        try:
            make(name)
        except ScanUnavailableError as error:
            print(f"{title}: not run, {error.message}\n")
            continue
        sides[title] = (name, stack)
    sides["transformer encoder"] = ("auto", transformer_encoder())
    return sides


def infer(model: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    if isinstance(model, nn.Module):
        model.eval()
    with torch.inference_mode():
        model(tokens)


def train(model: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    if isinstance(model, nn.Module):
        model.train()
        model.zero_grad(set_to_none=True)
    model(tokens.requires_grad_()).square().mean().backward()


def measure(
    sides: dict[str, Side], rounds: int, clock: Callable[[], float], title: str
) -> dict[str, list[float]]:
    """Milliseconds of each side in each round; sides take turns, the order turns with the round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for number in tqdm(range(rounds), desc=title, disable=None):
        names = list(sides)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = clock()
            sides[name]()
            times[name].append(1e3 * (clock() - began))
    return times


def on_the_cpu(rounds: int, clock: Callable[[], float], threads: list[int]) -> dict[str, object]:
    models = cpu_sides()
    results: dict[str, object] = {}
    for work, title, rows, count in (
        (infer, "forward, 1 row", 1, rounds),
        (train, "training step, 4 rows", 4, max(3, rounds // 3)),
    ):
        for number in threads:
            torch.set_num_threads(number)
            sides: dict[str, Side] = {}
            for name, (backend, model) in models.items():
                if name in ("transformers", "plain loop") and work is train:
                    continue  # 395 small operations a layer, backward too: minutes
                sides[name] = _side(backend, work, model, rows)
            label = f"{title}, {number} thread{'s' if number > 1 else ''}"
            times = measure(sides, count, clock, label)
            print_table(label, times, ("transformers", "blocked (torch)", "transformer encoder"))
            results[label] = {name: statistics.median(values) for name, values in times.items()}
    return results


def _side(
    backend: str, work: Callable[..., None], model: Callable[[Tensor], Tensor], rows: int
) -> Side:
    tokens = torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    def run() -> None:
        with scanned_by(backend):
            work(model, tokens.clone())

    return run


def print_table(title: str, times: dict[str, list[float]], against: tuple[str, ...]) -> None:
    against = tuple(name for name in against if name in times)
    print(f"\n### {title}\n")
    heads = "".join(f" times faster than {name} |" for name in against)
    print(f"| | median ms |{heads}\n|---|---|{'---|' * len(against)}")
    for name, values in times.items():
        ratios = ""
        for other in against:
            # Of each round, because the machine differs from round to round.
            ratio = statistics.median(o / v for o, v in zip(times[other], values, strict=True))
            ratios += f" {ratio:.2f} |"
        print(f"| {name} | {statistics.median(values):.1f} |{ratios}")


def errors() -> dict[str, object]:
    """Largest error against a loop in double, relative to the largest value, by backend."""
    print("\n### Error against a loop in double precision\n")
    print("| | forward | worst gradient |\n|---|---|---|")
    results: dict[str, object] = {}
    for title, shift in (("dt near 0.02", -4.0), ("dt near 2", 2.0)):
        exact = scan_inputs(1, TOKENS, 2 * WIDTH, 16, torch.float64, shift=shift)
        wanted = loop_scan(*exact, softplus=True)
        grad_y = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
        expected = torch.autograd.grad(wanted, exact, grad_y.double())
        for name in BACKEND_SIDES:
            try:
                backend = make(name)
            except ScanUnavailableError:
                continue
            single = [tensor.detach().float().requires_grad_() for tensor in exact]
            found = selective_scan(*single, softplus=True, backend=backend)
            gradients = torch.autograd.grad(found, single, grad_y)
            worst = max(relative_error(g, e) for g, e in zip(gradients, expected, strict=True))
            forward = relative_error(found, wanted)
            print(f"| {name}, {title} | {forward:.1e} | {worst:.1e} |")
            results[f"{name}, {title}"] = {"forward": forward, "gradient": worst}
    return results


def on_cuda(rounds: int) -> dict[str, object]:
    print("\n### CUDA\n")
    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return {}
    results: dict[str, object] = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for rows in (1, 4, 16, 64):
        for work, title in ((infer, "forward"), (train, "training step")):
            sides = _cuda_sides(work, rows)
            for name, run in list(sides.items()):
                graph = _captured(run) if work is infer else None
                if graph is not None:
                    sides[f"{name}, CUDA graph"] = graph
            label = f"CUDA, {title}, {rows} rows"
            times = measure(sides, rounds, _device_clock, label)
            print_table(label, times, ("transformer on SDPA",))
            results[label] = {name: statistics.median(values) for name, values in times.items()}
    return results


def _cuda_sides(work: Callable[..., None], rows: int) -> dict[str, Side]:
    stack = mamba_stack("cuda")
    tokens = torch.randn(rows, TOKENS, WIDTH, device="cuda")
    encoder = transformer_encoder("cuda")
    sides: dict[str, Side] = {"transformer on SDPA": lambda: work(encoder, tokens.detach())}
    for name in ("triton", "mamba_ssm", "blocked"):
        try:
            make(name)
        except ScanUnavailableError as error:
            print(f"\n{name}: not run, {error.message}")
            continue
        sides[name] = _on_device(name, work, stack, tokens)
    if find_spec("mamba_ssm") is not None:
        sides["mamba_ssm's reference"] = _mamba_reference(work, stack, tokens)
    return sides


def _on_device(name: str, work: Callable[..., None], stack: nn.Module, tokens: Tensor) -> Side:
    def run() -> None:
        with scanned_by(name):
            work(stack, tokens.detach())

    return run


def _mamba_reference(work: Callable[..., None], stack: nn.Module, tokens: Tensor) -> Side:
    from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found]
        selective_scan_ref,
    )

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor,
        softplus: bool,
    ) -> Tensor:  # fmt: skip
        first = [tensor.transpose(1, 2) for tensor in (u, delta)]
        states = [tensor.transpose(1, 2) for tensor in (B, C)]
        y: Tensor = selective_scan_ref(
            *first, A, *states, D=D, z=gate.transpose(1, 2), delta_softplus=softplus
        )
        return y.transpose(1, 2).contiguous()

    def run() -> None:
        with patch("reflexarc.policy.layers.mamba.selective_scan", scan):
            work(stack, tokens.detach())

    return run


def _captured(run: Side) -> Side | None:
    """The same work as a CUDA graph; None where it cannot be captured."""
    try:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = [1] if arguments.clock == "cpu" else sorted({1, cores or 1})
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    print(f"{describe_machine()}, torch {torch.__version__}, clock: {arguments.clock}")
    results: dict[str, object] = {"errors": errors()}
    results.update(on_the_cpu(arguments.rounds, clock, threads))
    results.update(on_cuda(arguments.rounds))
    if arguments.output is not None:
        write_json("mamba_scan", results, arguments.output)


if __name__ == "__main__":
    main()
