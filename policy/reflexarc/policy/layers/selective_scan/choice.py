"""Which code runs a scan: the choice is made at run time, by device and by what is installed.

===========  ================================================================================
mamba_ssm    CUDA; mamba_ssm's kernels, where the package can be imported
triton       CUDA; our own kernels, where triton can be imported
native       CPU; C++ compiled on this machine (seconds, once; kept in the cache folder)
blocked      anywhere; plain torch
===========  ================================================================================

``auto`` takes the first that runs. ``REFLEXARC_SCAN`` names one; it is an error where that one
does not run. The choice is made once a process and device kind, so that results do not change
within a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from reflexarc.policy.layers.selective_scan import blocked, convolution
from reflexarc.policy.layers.selective_scan.errors import ScanUnavailableError

logger = logging.getLogger(__name__)

VARIABLE = "REFLEXARC_SCAN"
_Scan = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], Tensor
]


@dataclass(frozen=True)
class Backend:
    """A scan and the convolution before it; both take tensors of one dtype, fp32 or fp64."""

    name: str
    scan: _Scan
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor]


def _blocked() -> Backend:
    return Backend("blocked", blocked.scan, convolution.convolve)


def _native() -> Backend:
    from reflexarc.policy.layers.selective_scan import native

    native.load()
    return Backend("native", native.scan, native.convolve)


def _triton() -> Backend:
    return Backend("triton", _import("triton_scan").scan, convolution.convolve)


def _mamba_ssm() -> Backend:
    return Backend("mamba_ssm", _import("mamba_ssm_scan").scan, convolution.convolve)


def _import(module: str) -> Any:
    """A module beside this one that needs a package which may be absent."""
    try:
        return import_module(f"{__package__}.{module}")
    except Exception as error:  # a package built for another torch fails in its own ways
        said = f"{type(error).__name__}: {error}"
        raise ScanUnavailableError(f"it cannot be imported ({said})") from error


_MAKERS = {"blocked": _blocked, "native": _native, "triton": _triton, "mamba_ssm": _mamba_ssm}
_BY_DEVICE = {"cuda": ("mamba_ssm", "triton", "blocked"), "cpu": ("native", "blocked")}
NAMES = ("auto", *_MAKERS)


def backend_for(device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend that scans tensors of ``dtype`` on ``device``.

    Raises:
        ScanUnavailableError: ``REFLEXARC_SCAN`` names one that does not run there.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if dtype == torch.float64 and device.type != "cpu":
        return make("blocked")  # the kernels of accelerators are of single precision
    return _automatic(device.type) if name == "auto" else _named(name, device.type)


def report(device: str) -> dict[str, object]:
    """What runs on a kind of device, and why what comes before it does not; for diagnosis."""
    why: dict[str, str] = {}
    found: dict[str, object] = {"why_not": why}
    try:
        found["name"] = backend_for(torch.device(device)).name
    except ScanUnavailableError as error:
        found["error"] = error.message
    for name in _BY_DEVICE.get(device, ()):
        try:
            make(name)
            break
        except ScanUnavailableError as error:
            why[name] = error.message
    return found


@cache
def make(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ScanUnavailableError: it does not run here, and why.
    """
    return _MAKERS[name]()


@cache
def _automatic(device: str) -> Backend:
    for name in _BY_DEVICE.get(device, ("blocked",)):
        try:
            return make(name)
        except ScanUnavailableError as error:
            # Without CUDA packages the plain way is the usual one; without a compiler it is slow.
            level = logging.WARNING if name == "native" else logging.INFO
            logger.log(level, "the %s scan is not used: %s", name, error)
    return make("blocked")


@cache
def _named(name: str, device: str) -> Backend:
    if name not in NAMES:
        raise ScanUnavailableError(
            f"{VARIABLE} is {name!r}, which is none of {', '.join(NAMES)}", field=VARIABLE
        )
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if name != "blocked" and name not in _BY_DEVICE.get(device, ()) and not interpreted:
        here = ", ".join(_BY_DEVICE.get(device, ("blocked",)))
        raise ScanUnavailableError(
            f"{VARIABLE} is {name!r}, but the tensors are on {device}, where these run: {here}",
            field=VARIABLE,
        )
    try:
        return make(name)
    except ScanUnavailableError as error:
        raise ScanUnavailableError(
            f"{VARIABLE} is {name!r}, but {error.message}; {VARIABLE}=auto takes what runs",
            field=VARIABLE,
        ) from error
