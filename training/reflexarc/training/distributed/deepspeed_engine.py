"""DeepSpeed's ZeRO-2: weights whole on every process, gradients and moments divided.

DeepSpeed keeps gradients and moments in one flat buffer a group of parameters, of which each
process holds a part. Here they become tensors a parameter, so that a checkpoint is the same
folder as under every other engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reflexarc.training.config import Recipe
from reflexarc.training.distributed.deepspeed_config import (
    check_deepspeed_config,
    read_deepspeed_config,
    resolved_deepspeed_config,
)
from reflexarc.training.distributed.engine import TrainedModules
from reflexarc.training.distributed.processes import SeveralProcesses
from reflexarc.training.gradient_norms import group_of, norms_of_groups
from reflexarc.training.objective import Batch, Draws, Losses
from reflexarc.training.optimization import trained_parameters
from reflexarc.training.precision import Precision
from reflexarc.training.weight_update import WeightUpdate


class DeepSpeedZeroTwo(SeveralProcesses):
    """Trains through DeepSpeed's engine, by the configuration in ``config``, or the packaged one.

    Raises ConfigError when the file is not what it should be.
    """

    name = "deepspeed"

    def __init__(self, device: torch.device, config: Path | None = None) -> None:
        self._library = _deepspeed(device)
        self._config = read_deepspeed_config(config)
        super().__init__(device)
        self._engine: Any = None

    def check(self, recipe: Recipe) -> None:
        check_deepspeed_config(self._config, recipe)

    def weight_update(
        self,
        modules: TrainedModules,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip: float | None,
    ) -> WeightUpdate:
        self._engine, _, _, _ = self._library.initialize(
            model=_Autocast(forward, precision),
            optimizer=optimizer,
            config=resolved_deepspeed_config(self._config, clip),
            dist_init_required=False,
        )
        return _Update(self._engine, trained_parameters(modules))

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def moments(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        found = {}
        for name, parameter in parameters.items():
            flat = _flat(optimizer, parameter)
            for moment, value in optimizer.state[flat].items():
                if value.ndim == 0:  # the number of steps, the same for all
                    found[f"{moment}/{name}"] = value.clone()
                    continue
                whole = torch.zeros_like(parameter).flatten()
                for theirs, mine in _places(parameter):
                    whole[mine] = value[theirs].to(whole.device)
                dist.all_reduce(whole)
                kept = whole.cpu() if self.is_first else whole.to("meta")
                found[f"{moment}/{name}"] = kept.view(parameter.shape)
        return found

    @torch.no_grad()
    def put_moments(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        values: Mapping[str, Tensor],
    ) -> None:
        for name, parameter in parameters.items():
            for moment, target in optimizer.state[_flat(optimizer, parameter)].items():
                value = values[f"{moment}/{name}"]
                if target.ndim == 0:
                    target.copy_(value)
                for theirs, mine in _places(parameter) if target.ndim else ():
                    target[theirs] = value.flatten()[mine].to(target.device)
        self._engine.optimizer.refresh_fp32_params()  # the weights were put into what computes

    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        super().close()


class _Autocast(nn.Module):
    """Products in the recipe's precision: DeepSpeed switches off an autocast around its own."""

    def __init__(self, modules: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.modules_, self._precision = modules, precision

    def forward(self, batch: Batch, draws: Draws) -> Losses:
        with self._precision.autocast():
            losses: Losses = self.modules_(batch, draws)
        return losses


class _Update(WeightUpdate):
    """DeepSpeed's own backward pass, clipping and step."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._engine = engine
        self._parameters = list(parameters.values())
        self._groups = [group_of(name) for name in parameters]

    def losses(self, batch: Batch, draws: Draws) -> Losses:
        losses: Losses = self._engine(batch, draws)
        return losses

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> dict[str, Tensor]:
        squares = torch.stack([_square_of_part(parameter) for parameter in self._parameters])
        dist.all_reduce(squares)
        norms = norms_of_groups(self._groups, squares.sqrt())
        self._engine.step()
        return norms


def _square_of_part(parameter: nn.Parameter) -> Tensor:
    """The sum of squares of that part of a parameter's gradient which this process holds."""
    part = parameter._hp_mapping  # type: ignore[attr-defined]
    if part is None:
        return parameter.new_zeros(())
    gradient = part.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
    norm: Tensor = torch.linalg.vector_norm(gradient.to(parameter.device))
    return norm.square()


def _flat(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """The buffer in which this process holds its part of a parameter; any, where it holds none."""
    part = parameter._hp_mapping  # type: ignore[attr-defined]
    group = optimizer.param_groups[0 if part is None else part.param_group_index]
    buffer: Tensor = group["params"][0]
    return buffer


def _places(parameter: nn.Parameter) -> Sequence[tuple[slice, slice]]:
    """Where this process holds a part of a parameter: in its flat buffer, in the parameter."""
    part = parameter._hp_mapping  # type: ignore[attr-defined]
    if part is None:
        return ()
    there, here = part.hp_fragment_address, part.lp_fragment_address
    return ((slice(there.start, there.start + there.numel),
             slice(here.start, here.start + here.numel)),)  # fmt: skip


def _deepspeed(device: torch.device) -> Any:
    """The library, told which device it is to use, and to keep to itself what goes well."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
