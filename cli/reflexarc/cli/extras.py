"""Say which ``pip install`` brings what a command needs."""

from __future__ import annotations

from importlib.util import find_spec

from reflexarc.contract.errors import MissingExtraError


def require(command: str, extra: str, *modules: str) -> None:
    """Raise MissingExtraError for the first module that is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtraError(command, extra, module)
