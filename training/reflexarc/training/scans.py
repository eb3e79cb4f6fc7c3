"""Which scan a run's Mamba layers use: other scans round otherwise, so a run says which it was."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from reflexarc.policy.layers.mamba import Mamba
from reflexarc.policy.layers.selective_scan import backend_for
from reflexarc.policy.layers.selective_scan.choice import VARIABLE

SCAN = "scan"


def scan_of(policy: nn.Module, device: torch.device) -> str | None:
    """The scan that runs on ``device``; None for a policy without Mamba."""
    if not any(isinstance(module, Mamba) for module in policy.modules()):
        return None
    return backend_for(device).name


def other_scan(checkpoint: Path, now: str | None) -> str | None:
    """A line about a checkpoint that another scan than ``now`` made; None where none did.

    A checkpoint without a record, or one that cannot be read, says nothing.
    """
    try:
        manifest = json.loads((checkpoint / "policy.json").read_text(encoding="utf-8"))
        before = manifest["provenance"].get(SCAN)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if before is None or now is None or before == now:
        return None
    return (
        f"the scan is now {now}, it was {before} until here: what is learnt differs in its last "
        f"bits from a run that was not interrupted; {VARIABLE}={before} keeps them"
    )
