"""Compute each block of a policy anew in the backward pass instead of keeping what it held."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy


def checkpoint_activations(policy: Policy) -> None:
    """Let every block of ``policy.blocks()`` keep only its inputs while training.

    Losses and gradients stay the same to the last bit on a CPU; names of weights do too.

    Raises ConfigError for a policy that names no blocks.
    """
    blocks = policy.blocks()
    if not blocks:
        raise ConfigError(
            f"training.activation_checkpointing needs a policy that names its blocks, and "
            f"{policy.family} names none; leave it out",
            field="training.activation_checkpointing",
        )
    for block in blocks:
        block.forward = partial(_anew_in_backward, block.forward)


def _anew_in_backward(forward: Any, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
