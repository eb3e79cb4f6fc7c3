"""Several processes that train one run: what every engine of them needs, and plain DDP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reflexarc.training.distributed.engine import Engine, TrainedModules
from reflexarc.training.errors import ProcessLostError

T = TypeVar("T")
_PATIENCE = timedelta(days=1)
_LOST_WORDS = ("gloo/transport", "connection closed by peer", "connection reset by peer")


@contextmanager
def naming_a_lost_process(engine: Engine) -> Iterator[None]:
    """Within the block an exchange that fails because a process has gone raises ProcessLostError.

    On CUDA it may be the library that sends that ends this process, after its own time limit.
    """
    try:
        yield
    except RuntimeError as error:
        if engine.world == 1 or not _is_lost(error):
            raise
        raise ProcessLostError(
            f"process {engine.rank} of {engine.world} no longer reaches another one: it ended, or "
            f"its machine went ({str(error).splitlines()[0][:200]}). Look at what the others "
            "printed; then start all of them again with the same command and --resume",
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):  # NCCL, and the store in which processes meet
        return True
    return any(words in str(error).lower() for words in _LOST_WORDS)


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
        tensors = [*modules.named_parameters(), *modules.named_buffers()]
        # They are the same everywhere and stay so: nothing of them has to be sent.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            modules, [name for name, _ in tensors if not modules.is_trained(name)]
        )
        self._wrapped = DistributedDataParallel(modules, gradient_as_bucket_view=True)
        return self._wrapped

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped.no_sync()
