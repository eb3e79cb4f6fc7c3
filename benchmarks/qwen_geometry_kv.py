"""Keys and values of the head's contexts once a chunk, against anew in every Euler step.

Both sides make the same chunks with the same weights, in turns; the largest difference of their
actions is printed beside the ratio of the times. Prints a table in Markdown.

    python benchmarks/qwen_geometry_kv.py
    python benchmarks/qwen_geometry_kv.py --width 512 --layers 8 --context 256 --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from reflexarc.policy.layers.flow_matching import euler_sample
from reflexarc.policy.qwen_geometry.config import HeadConfig
from reflexarc.policy.qwen_geometry.head import DiffusionHead

ACTIONS, HORIZON = 7, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=512, help="of head and contexts")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=226, help="tokens of a layer's context")
    parser.add_argument("--self-attention", action="store_true")
    parser.add_argument("--future", type=int, default=32, help="future tokens, as the document's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 10])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = HeadConfig(
        layers=options.layers,
        heads=options.width // 64,
        head_dimension=64,
        future_tokens=options.future,
        self_attention=options.self_attention,
        positions=HORIZON,
        output_dimension=options.width,
        output_hidden=options.width,
        state_hidden=options.width,
    )
    head = DiffusionHead(
        config, source=options.width, state=8, horizon=HORIZON, actions=ACTIONS
    ).eval()
    head.to(options.device)
    mixing = "with" if options.self_attention else "without"
    print(
        f"width {options.width}, {options.layers} layers, {options.context} context tokens, "
        f"{options.future} future tokens, {mixing} self-attention, {options.device}\n"
    )
    print("| batch | steps | once, ms | every step, ms | ratio | largest difference |")
    print("|--:|--:|--:|--:|--:|--:|")
    for batch in options.batch:
        for steps in options.steps:
            measure(head, options, batch, steps)


@torch.inference_mode()
def measure(head: DiffusionHead, options: argparse.Namespace, batch: int, steps: int) -> None:
    """One line of the table."""
    device = options.device
    contexts = [
        torch.randn(batch, options.context, options.width, device=device)
        for _ in range(options.layers)
    ]
    mask = torch.ones(batch, options.context, dtype=torch.bool, device=device)
    state = torch.randn(batch, 8, device=device)
    noise = torch.randn(batch, HORIZON, ACTIONS, device=device)

    def once() -> Tensor:
        return head.sample(head.context(contexts, mask, state), noise, steps)

    def every_step() -> Tensor:
        return euler_sample(
            lambda x, t: head(head.seen_by_actions(head.context(contexts, mask, state)), x, t),
            noise,
            steps,
        )

    difference = float((once() - every_step()).abs().max())
    times: dict[str, list[float]] = {"once": [], "every": []}
    for _ in range(options.rounds):
        for name, side in (("once", once), ("every", every_step)):
            times[name].append(seconds(side, device))
    ratio = statistics.median(
        every / one for one, every in zip(times["once"], times["every"], strict=True)
    )
    one, every = (1000 * statistics.median(times[name]) for name in ("once", "every"))
    print(
        f"| {batch} | {steps} | {one:.1f} | {every:.1f} | {ratio:.2f} | {difference:.1e} |",
        flush=True,
    )


def seconds(side: Callable[[], Tensor], device: str) -> float:
    """Of the processor on a CPU, which a busy machine does not change; of the clock elsewhere."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    side()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
