"""Find a user's class: by ``module:Class`` from the command line, or by an entry point's name.

No torch here: a plain policy class is served without it.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from reflexarc.contract.errors import ConfigError

ENTRY_POINT_GROUP = "reflexarc.policies"
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def installed_policies() -> dict[str, list[EntryPoint]]:
    """Entry points of the group by name; read from metadata, nothing is imported.

    A name has several entry points when several packages claim it.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        claims = found.setdefault(point.name, [])
        # An editable install may list its metadata twice: the same value is the same claim.
        if point.value not in (claim.value for claim in claims):
            claims.append(point)
    return found


def import_entry_point(name: str) -> object:
    """What an installed package offers under ``name``.

    Raises ConfigError: no such name, two packages claim it, or its import fails.
    """
    installed = installed_policies()
    if name not in installed:
        raise ConfigError(
            f"no installed package offers a policy {name!r}; "
            f"installed: {', '.join(sorted(installed)) or 'none'}",
            field="policy",
        )
    claims = installed[name]
    if len(claims) > 1:
        raise ConfigError(
            f"several packages claim the policy {name!r}: "
            f"{', '.join(sorted(claim.value for claim in claims))}; uninstall all but one, or "
            "name the class itself as module:Class",
            field="policy",
        )
    return import_object(claims[0].value)


def import_object(path: str, *, search: Path | None = None) -> object:
    """What ``module:Class`` names.

    Args:
        path: ``package.module:Class``.
        search: a directory whose modules come before installed ones, as with ``python -m``.

    Raises ConfigError: malformed, no such module, an import that fails, no such name in it.
    """
    if _PATH.fullmatch(path) is None:
        raise ConfigError(
            f"{path!r} is no class; write module:Class, for example my_package.my_policy:MyPolicy",
            field="policy",
        )
    if search is not None and str(search) not in sys.path:
        sys.path.insert(0, str(search))
    module_name, _, name = path.partition(":")
    found: object = _import_module(module_name, search)
    for part in name.split("."):
        if not hasattr(found, part):
            names = getattr(found, "__dict__", {})
            offered = sorted(key for key, value in names.items() if isinstance(value, type))
            raise ConfigError(
                f"{module_name} has no {name!r}; classes there: {', '.join(offered) or 'none'}",
                field="policy",
            )
        found = getattr(found, part)
    return found


def _import_module(name: str, search: Path | None) -> object:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            where = f" and {search}" if search is not None else ""
            raise ConfigError(
                f"there is no module {error.name!r} (of {name!r}) among the installed "
                f"packages{where}; install it, or start from the folder that holds it",
                field="policy",
            ) from error
        raise ConfigError(
            f"{name} imports {error.name!r}, which is not installed; install it beside reflexarc",
            field="policy",
        ) from error
    except Exception as error:
        raise ConfigError(
            f"importing {name} failed: {type(error).__name__}: {error}{_where(error)}",
            field="policy",
        ) from error


def _where(error: BaseException) -> str:
    """`` (file, line N)`` of the innermost frame, which stands in the user's own code."""
    trace = error.__traceback__
    if isinstance(error, SyntaxError) or trace is None:
        return ""  # its message names file and line
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"
