"""The policy families by name; a family's code is imported when it is first asked for.

A name is looked up among the families of this package, then among those that :func:`register`
added in this process, then among the entry points of installed packages (group
``reflexarc.policies``). A checkpoint names a family and nothing else: no file of a checkpoint can
make this process import a module that nobody installed or named on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.entry_points import import_entry_point, installed_policies
from reflexarc.policy.interface import Policy

FAMILIES: dict[str, str] = {
    "mobile_vla": "reflexarc.policy.mobile_vla.model:MobileVLA",
    "qwen_geometry": "reflexarc.policy.qwen_geometry.model:QwenGeometry",
    "statevla": "reflexarc.policy.statevla.model:StateVLA",
    "vjepa2_head": "reflexarc.policy.vjepa2_head.model:VJEPA2Head",
}
"""Family name to ``module:class`` of the families that come with this package."""

_registered: dict[str, type[Policy]] = {}


def policy_class(family: str) -> type[Policy]:
    """The class of a family.

    Raises ConfigError naming the families there are, or the entry point that is no family.
    """
    if family in FAMILIES:
        module, name = FAMILIES[family].split(":")
        found: type[Policy] = getattr(import_module(module), name)
        return found
    if family in _registered:
        return _registered[family]
    if family not in installed_policies():
        raise ConfigError(
            f"unknown policy family {family!r}; known: {', '.join(known_families())}. A family "
            "of your own comes from an installed package's entry point in the group "
            "'reflexarc.policies', or with: serve-policy --ckpt DIR --policy module:Class",
            field="family",
        )
    return _family_of_entry_point(family)


def known_families() -> list[str]:
    """Names of all families, sorted; entry points are named without importing them."""
    return sorted({*FAMILIES, *_registered, *installed_policies()})


def register(policy: type[Policy]) -> type[Policy]:
    """Add a family to this process under ``policy.family``; usable as a class decorator.

    Raises ConfigError for a class that is no Policy, has no family name, or takes the name of
    another one.
    """
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigError(
            f"{policy!r} is no family: derive it from reflexarc.policy.interface.Policy",
            field="policy",
        )
    family = getattr(policy, "family", None)
    if not isinstance(family, str) or not family:
        raise ConfigError(
            f"{policy.__qualname__} has no family name; add the class attribute family = '...'",
            field="family",
        )
    if family in FAMILIES and policy_class(family) is policy:
        return policy
    if family in FAMILIES or _registered.get(family, policy) is not policy:
        raise ConfigError(
            f"{policy.__qualname__} takes the name {family!r} of another family; choose another",
            field="family",
        )
    _registered[family] = policy
    return policy


@contextmanager
def registered(*policies: type[Policy]) -> Iterator[None]:
    """Families that are known only inside the ``with`` block."""
    before = dict(_registered)
    try:
        for policy in policies:
            register(policy)
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def _family_of_entry_point(family: str) -> type[Policy]:
    found = import_entry_point(family)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(
            f"the entry point {family!r} is {found!r}, which is no Policy and reads no "
            f"checkpoint; serve it alone: serve-policy --policy {family}",
            field="family",
        )
    if found.family != family:
        raise ConfigError(
            f"the entry point {family!r} leads to {found.__qualname__}, whose family is "
            f"{found.family!r}; give both the same name in its package",
            field="family",
        )
    return found
