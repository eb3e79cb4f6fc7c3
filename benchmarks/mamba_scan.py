"""Mamba's backends beside transformers' Mamba and a transformer encoder of the same depth.

Twelve layers of width 256 (the encoder of StateVLA) on 395 tokens: a forward pass of one row and a
training step (forward and backward) of four, on one thread and on all cores. Each side has
processes of its own, which take turns in changing order, so that whatever else the machine does
hits all alike. ``transformers`` is ``MambaModel`` without its kernels; ``transformer encoder`` is
``torch.nn.TransformerEncoder`` (8 heads, 1024 hidden, 9.5 M parameters; in inference mode it takes
torch's fused layers). Each side runs as its users run it, ours in a forward pass with freed memory
kept, as by ``serve-policy``; forward passes once more with memory kept by all. Ratios are medians
of the rounds' ratios.

    python benchmarks/mamba_scan.py [--rounds 9] [--clock wall] [--output FILE]   # 8 minutes

On CUDA: Triton's scan against mamba_ssm's reference and kernel and a transformer on SDPA, 1 to 64
rows, where each is installed. Prints markdown; ``--clock cpu`` counts the process' CPU time, which
other processes disturb less.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
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
from reflexarc.policy.threads import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "policy"))
from scan_reference import loop_scan, relative_error, scan_inputs

WIDTH, LAYERS, TOKENS = 256, 12, 395
ROUNDS_OF_A_PROCESS = 3
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


def backends_here() -> dict[str, str]:
    """Title to backend of the CPU's scans that run here; says why another does not."""
    found = {}
    for name, title in BACKEND_SIDES.items():
        try:
            make(name)
        except ScanUnavailableError as error:
            print(f"{title}: not run, {error.message}\n")
            continue
        found[title] = name
    return found


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


def in_turns(
    sides: Mapping[str, Callable[[], float]], rounds: int, title: str
) -> dict[str, list[float]]:
    """What each side says in each round; sides take turns, the order turns with the round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in tqdm(range(rounds), desc=title, disable=None):
        names = list(sides)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(sides[name]())
    return found


def measure(
    sides: dict[str, Side], rounds: int, clock: Callable[[], float], title: str
) -> dict[str, list[float]]:
    """Milliseconds of each side of this process in each round."""

    def timed(side: Side) -> float:
        began = clock()
        side()
        return 1e3 * (clock() - began)

    for side in sides.values():
        side()
    return in_turns({name: partial(timed, side) for name, side in sides.items()}, rounds, title)


class Worker:
    """A side in a process of its own, which takes its turn when it is asked.

    What glibc does with large tensors, keep their pages or give them back each time, depends on
    who shares the heap, and is half of transformers' time.
    """

    def __init__(
        self, title: str, backend: str, work: str, rows: int, threads: int, keeps: bool
    ) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin,
            initargs=(title, backend, work, rows, threads, keeps),
        )  # fmt: skip
        self.ask("perf_counter")  # loads, and warms up

    def ask(self, clock: str) -> float:
        """Milliseconds of one call."""
        return self._pool.submit(_timed, clock).result()

    def close(self) -> None:
        self._pool.shutdown()


_run: Side | None = None  # of a worker's process


def _begin(title: str, backend: str, work: str, rows: int, threads: int, keeps: bool) -> None:
    global _run  # noqa: PLW0603
    torch.set_num_threads(threads)
    if keeps:
        keep_freed_memory()
    models = {"transformers": transformers_mamba, "transformer encoder": transformer_encoder}
    model = models.get(title, mamba_stack)()
    _run = _side(backend, {"infer": infer, "train": train}[work], model, rows)
    _run()


def _timed(clock: str) -> float:
    assert _run is not None  # _begin has run
    _run()  # the caches still hold what the others did in their turns
    began = getattr(time, clock)()
    _run()
    return 1e3 * float(getattr(time, clock)() - began)


def on_the_cpu(rounds: int, clock: str, threads: list[int]) -> dict[str, object]:
    scans = backends_here()
    slow = {"transformers": "auto", "plain loop": "loop"}
    results: dict[str, object] = {}
    for work, title, rows in (
        ("infer", "forward, 1 row", 1),
        ("train", "training step, 4 rows", 4),
    ):
        # A step of the slow ones is 395 small operations a layer, backward too: minutes.
        sides = (slow if work == "infer" else {}) | scans | {"transformer encoder": "auto"}
        for number in threads:
            label = f"{title}, {number} thread{'s' if number > 1 else ''}"
            against = ("transformers", "blocked (torch)", "transformer encoder")
            keep = set(scans) if work == "infer" else set()
            times = _in_processes(sides, work, rows, number, rounds, clock, keep, label)
            print_table(label, times, against)
            results[label] = {name: statistics.median(values) for name, values in times.items()}
            if work == "infer":
                label += ", freed memory kept by all"
                times = _in_processes(sides, work, rows, number, rounds, clock, set(sides), label)
                print_table(label, times, against)
                results[label] = {name: statistics.median(v) for name, v in times.items()}
    return results


def _in_processes(
    sides: Mapping[str, str], work: str, rows: int, threads: int, rounds: int, clock: str,
    keep: Set[str], label: str,
) -> dict[str, list[float]]:  # fmt: skip
    """Milliseconds of each side; those of ``keep`` set malloc as our command line does."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(max(1, rounds // ROUNDS_OF_A_PROCESS)):
        workers = {
            name: Worker(name, backend, work, rows, threads, name in keep)
            for name, backend in sides.items()
        }
        asked = {name: partial(worker.ask, clock) for name, worker in workers.items()}
        for name, found in in_turns(asked, ROUNDS_OF_A_PROCESS, label).items():
            times[name] += found
        for worker in workers.values():
            worker.close()
    return times


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
    clock = "perf_counter" if arguments.clock == "wall" else "process_time"
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
