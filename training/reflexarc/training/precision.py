"""Single precision, bfloat16 or float16 while training; weights and moments stay single."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.training.errors import TrainingDivergedError

PrecisionName: TypeAlias = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 2.0**-14


class Precision:
    """Autocast, and for float16 a factor on the loss that keeps small gradients from vanishing.

    A step whose scaled gradients overflow changes no weights and lowers the factor.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self._device_type = device.type
        self._dtype = _DTYPES.get(name)
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to their size, before they are measured."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def reported(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradient norms as they are logged: those of a step that was skipped count as 0.

        With float16 there comes ``skipped_steps``, their share of the steps.
        """
        if self.scaler is None:
            return norms
        finite = torch.isfinite(norms["gradient_norm"])
        kept = {name: torch.where(finite, value, 0.0) for name, value in norms.items()}
        return {**kept, "skipped_steps": (~finite).float()}

    def values(self) -> dict[str, float]:
        """``loss_scale`` where there is one.

        Raises TrainingDivergedError when it fell so low that no gradient can be finite.
        """
        if self.scaler is None:
            return {}
        scale = self.scaler.get_scale()
        if scale < _SMALLEST_SCALE:
            raise TrainingDivergedError(
                f"gradients are not finite at any loss scale (it fell to {scale:g}). Nothing was "
                "overwritten; `last` is the checkpoint before. Train with training.precision=bf16 "
                "or fp32, or lower optimizer.learning_rate",
                field="training.precision",
            )
        return {"loss_scale": scale}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the loss scale; None where there is none."""
        return None if self.scaler is None else self.scaler.state_dict()

    def load_state(self, state: dict[str, Any] | None) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def precision_on(name: PrecisionName, device: torch.device) -> tuple[PrecisionName, str | None]:
    """What a recipe's precision becomes on a device, and what a person should know of it.

    Autocast on MPS has gaps and no loss scaling: there a run computes in single precision.
    """
    if device.type != "mps" or name == "fp32":
        return name, None
    return "fp32", f"training.precision is {name}; on MPS this run computes in fp32"


def check_precision(name: str, device: torch.device) -> None:
    """Raise ConfigError when ``device`` cannot compute in this precision."""
    dtype = _DTYPES.get(name)
    if dtype is None:
        return
    try:
        with torch.autocast(device.type, dtype=dtype):
            one = torch.ones(2, 2, device=device)
            works = (one @ one).dtype == dtype
    except RuntimeError:
        works = False
    if not works:
        raise ConfigError(
            f"training.precision is {name}, which {device} cannot compute in with this torch; "
            "choose fp32",
            field="training.precision",
        )
