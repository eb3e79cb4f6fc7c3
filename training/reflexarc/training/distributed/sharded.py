"""FSDP2 and ZeRO-2: gradients, moments, averages and weights divided over the processes.

It is torch's ``fully_shard``, which accelerate calls too; accelerate itself refuses to shard on
CPUs, where this is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from reflexarc.training.distributed.engine import TrainedModules
from reflexarc.training.distributed.processes import SeveralProcesses
from reflexarc.training.optimization import AveragedWeights


class FullySharded(SeveralProcesses):
    """Each process holds its part of every tensor that is trained or moves.

    Validation and checkpoints go through a whole copy of policy and objective, which lies in the
    memory of the host and is on the device only meanwhile.
    """

    name = "fsdp2"
    _gathers_again = True
    _sharded: FSDPModule
    _copy: TrainedModules

    def wrap(self, modules: TrainedModules, blocks: Sequence[nn.Module]) -> nn.Module:
        self._copy = copy.deepcopy(modules).requires_grad_(False).to("cpu")
        marks = {name: dict(vars(p)) for name, p in modules.named_parameters()}
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self._gathers_again)
        fully_shard(modules, mesh=mesh)
        for name, parameter in modules.named_parameters():
            vars(parameter).update(marks[name])  # such as that it never decays
        self._sharded = cast(FSDPModule, modules)
        return modules

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        self._sharded.set_requires_gradient_sync(last)
        self._sharded.set_is_last_backward(last)
        return nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        everything: Tensor = tensor.full_tensor()
        return everything

    def put(self, target: Tensor, value: Tensor) -> None:
        if isinstance(target, DTensor):
            # Every process has read the whole value: none has to be sent.
            value = distribute_tensor(
                value.to(self.device), target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(value)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():
            everything = self.whole(tensor.detach())  # all processes take part
            if self.is_first:
                kept[name] = everything.cpu().clone().contiguous()
        return kept

    @contextmanager
    def served(
        self, modules: TrainedModules, averaged: AveragedWeights | None
    ) -> Iterator[TrainedModules]:
        values: dict[str, Any] = dict(modules.state_dict())
        if averaged is not None:
            values |= {f"policy.{name}": value for name, value in averaged.values.items()}
        with torch.no_grad():
            for name, target in self._copy.state_dict().items():
                if modules.is_trained(name):
                    target.copy_(self.whole(values[name].detach()))
        yield self._copy.to(self.device)
        self._copy.to("cpu")


class DividedGradients(FullySharded):
    """ZeRO-2: a block's weights, gathered for its forward pass, stay until its backward pass.

    Half of the messages of ``fsdp2``, for the memory of the weights.
    """

    name = "zero2"
    _gathers_again = False
