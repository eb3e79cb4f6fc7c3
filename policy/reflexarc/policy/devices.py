"""Which device a policy runs on."""

from __future__ import annotations

import torch

from reflexarc.contract.errors import ConfigError


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA, else MPS, else CPU. Raises ConfigError for a device that is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"no such device {name!r}; use auto, cpu, cuda, cuda:0 or mps", field="device"
        ) from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise ConfigError(
            f"device {name!r} is not available on this machine; use auto or cpu", field="device"
        )
    return device
