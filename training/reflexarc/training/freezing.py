"""Modules of a policy by path: those that keep their weights, those that learn more slowly."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy
from reflexarc.training.objective import Objective


def module_at(policy: Policy, path: str, key: str) -> nn.Module:
    """The module at a dotted path of the policy.

    Raises ConfigError, naming the recipe's ``key`` and the modules there are.
    """
    try:
        return policy.get_submodule(path) if path else _missing()
    except AttributeError as error:
        known = ", ".join(name for name, _ in policy.named_children())
        raise ConfigError(
            f"{key} names the module {path!r}, which a {policy.family} policy has not; it has "
            f"{known}, and what is inside them",
            field=key,
        ) from error


def freeze_modules(policy: Policy, paths: Iterable[str]) -> None:
    """Let the modules at ``paths`` keep the weights that they have."""
    for path in paths:
        module_at(policy, path, "freeze").requires_grad_(False)


def set_training_mode(policy: Policy, objective: Objective, frozen: Iterable[str]) -> None:
    """Training mode for all but the frozen modules, whose dropout and averages stand still too."""
    policy.train()
    objective.train()
    for path in frozen:
        policy.get_submodule(path).eval()


def _missing() -> nn.Module:
    raise AttributeError("an empty path")
