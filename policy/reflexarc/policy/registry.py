"""The policy families by name; a family's code is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.interface import Policy

FAMILIES: dict[str, str] = {"statevla": "reflexarc.policy.statevla.model:StateVLA"}
"""Family name to ``module:class``."""


def policy_class(family: str) -> type[Policy]:
    """The class of a family. Raises ConfigError naming the families there are."""
    if family not in FAMILIES:
        raise ConfigError(
            f"unknown policy family {family!r}; known: {', '.join(sorted(FAMILIES))}",
            field="family",
        )
    module, name = FAMILIES[family].split(":")
    found: type[Policy] = getattr(import_module(module), name)
    return found
