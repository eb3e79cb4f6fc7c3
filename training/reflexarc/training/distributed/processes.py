"""Several processes that train one run: what every engine of them needs, and plain DDP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reflexarc.training.distributed.engine import Engine, TrainedModules

T = TypeVar("T")
_PATIENCE = timedelta(days=1)


class SeveralProcesses(Engine):
    """The default process group exists already; gradients go through it.

    What the trainer asks besides goes through a group of its own on the host, so that it neither
    waits for the device nor runs into the limit of a collective when one process still computes
    features or writes a checkpoint.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def collected(self, item: T) -> list[T]:
        found: list[T | None] = [None] * self.world
        dist.all_gather_object(found, item, group=self._host)
        return found  # type: ignore[return-value]

    def highest(self, number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._host)
        return int(value)

    def wait(self) -> None:
        dist.barrier(group=self._host)

    def close(self) -> None:
        dist.destroy_process_group()


class DataParallel(SeveralProcesses):
    """Every process holds all weights; gradients are averaged (DistributedDataParallel)."""

    name = "ddp"
    _wrapped: DistributedDataParallel

    def wrap(self, modules: TrainedModules, blocks: Sequence[nn.Module]) -> nn.Module:
        frozen = tuple(f"policy.{path}." for path in modules.policy.frozen_backbones())
        tensors = [*modules.named_parameters(), *modules.named_buffers()]
        # They are the same everywhere and stay so: nothing of them has to be sent.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            modules, [name for name, _ in tensors if name.startswith(frozen)]
        )
        self._wrapped = DistributedDataParallel(modules, gradient_as_bucket_view=True)
        return self._wrapped

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped.no_sync()
