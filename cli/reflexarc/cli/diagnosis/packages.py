"""Python itself and the packages of every extra, by what the installed reflexarc says it needs."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from reflexarc.cli.diagnosis.finding import EXTRA_OF, PURPOSES, Finding, Purpose
from reflexarc.contract.errors import install_line

# A purpose counts as installed when these are there; that the rest is missing is then a fault.
_SIGNS: dict[Purpose, tuple[str, ...]] = {
    "serve": ("fastapi", "torch"),
    "train": ("h5py", "torch"),
    "sim": ("mujoco",),
}
_REQUIREMENT = re.compile(
    r"^(?P<name>[\w.-]+)(?P<range>[^;]*)(?:;.*extra == ['\"](?P<extra>\w+)['\"])?"
)


def installed_purposes() -> tuple[Purpose, ...]:
    """What this environment was installed for, as far as its packages tell."""
    return tuple(
        purpose for purpose, signs in _SIGNS.items() if all(_version(sign) for sign in signs)
    )


def check_python() -> Finding:
    found = platform.python_version()
    if sys.version_info >= (3, 13):
        return Finding("python", "note", f"{found}, tested are 3.10 to 3.12")
    return Finding("python", "ok", found)


def check_extras(purposes: tuple[Purpose, ...]) -> list[Finding]:
    """One finding an extra; one that lacks packages is broken where its purpose is asked for."""
    needed = requirements()
    purpose_of = {extra: purpose for purpose, extra in EXTRA_OF.items()}
    findings = []
    for extra in ("", *EXTRA_OF.values(), "demo"):
        name = f"packages: {extra or 'base'}"
        wrong = [text for text in map(_problem, needed.get(extra, [])) if text]
        if not wrong:
            findings.append(Finding(name, "ok", f"all {len(needed.get(extra, []))} installed"))
            continue
        purpose = purpose_of.get(extra)
        asked = extra == "" or purpose in purposes
        findings.append(
            Finding(
                name,
                "broken" if asked else "note",
                ", ".join(wrong),
                install_line(extra) if extra else "pip install reflexarc",
                (purpose,) if purpose else (),
            )
        )
    return findings


def requirements() -> dict[str, list[tuple[str, str]]]:
    """Extra to names and version ranges of its packages; the base install's under ``""``."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in requires("reflexarc") or []:
        match = _REQUIREMENT.match(line)
        if match is None or line.lower().startswith("reflexarc["):
            continue
        found.setdefault(match["extra"] or "", []).append((match["name"], match["range"].strip()))
    return found


def _problem(requirement: tuple[str, str]) -> str:
    """What is wrong with one package; empty when nothing is."""
    name, wanted = requirement
    found = _version(name)
    if found is None:
        return f"{name} missing"
    try:  # comes with most environments, but not with the base install
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return ""
    ranges = SpecifierSet(wanted.strip("() "))
    return "" if ranges.contains(found, prereleases=True) else f"{name} {found}, needed {ranges}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def all_purposes(asked: str | None) -> tuple[Purpose, ...]:
    """The purposes that decide over the exit status."""
    return tuple(p for p in PURPOSES if p == asked) if asked else installed_purposes()
