"""Families beside the built-in ones: registered in the process, or installed as entry points."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reflexarc.contract.errors import ConfigError
from reflexarc.policy.entry_points import import_entry_point, installed_policies
from reflexarc.policy.interface import Policy
from reflexarc.policy.registry import FAMILIES, known_families, policy_class, register, registered
from reflexarc.policy.statevla.model import StateVLA


class Mine(StateVLA):
    family = "mine"


class AlsoMine(StateVLA):
    family = "mine"


def test_registered_families_are_known_inside_the_block() -> None:
    with registered(Mine):
        assert policy_class("mine") is Mine
        assert known_families() == sorted(["mine", *FAMILIES])
    assert known_families() == sorted(FAMILIES)
    with pytest.raises(ConfigError, match=f"'mine'; known: {', '.join(sorted(FAMILIES))}"):
        policy_class("mine")


def test_names_are_taken_once() -> None:
    with registered(Mine):
        assert register(Mine) is Mine
        with pytest.raises(ConfigError, match="AlsoMine takes the name 'mine'"):
            register(AlsoMine)
    with (
        pytest.raises(ConfigError, match="takes the name 'statevla'"),
        registered(type("Other", (Mine,), {"family": "statevla"})),
    ):
        pass
    assert register(StateVLA) is StateVLA
    assert known_families() == sorted(FAMILIES)


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="derive it from"):
        register(int)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no family name"):
        register(type("Nameless", (Policy,), {}))


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with entry points where installed ones are found."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(package: str, points: dict[str, str], source: str = "") -> None:
        information = tmp_path / f"{package}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        lines = [f"{name} = {value}" for name, value in points.items()]
        (information / "entry_points.txt").write_text(
            "\n".join(["[reflexarc.policies]", *lines, ""])
        )
        (tmp_path / f"{package}.py").write_text(source)
        importlib.invalidate_caches()

    yield make
    for name in [name for name in sys.modules if name.startswith("robotlab")]:
        del sys.modules[name]


FAMILY = (
    "from reflexarc.policy.statevla.model import StateVLA\n"
    "class Theirs(StateVLA):\n    family = 'theirs'\n"
)


def test_a_family_of_an_installed_package(install: Install) -> None:
    install("robotlab", {"theirs": "robotlab:Theirs"}, FAMILY)
    assert known_families() == sorted(["theirs", *FAMILIES])
    assert "robotlab" not in sys.modules, "to know a name imports nothing"
    assert policy_class("theirs") is sys.modules["robotlab"].Theirs  # type: ignore[attr-defined]


def test_entry_points_that_are_no_family(install: Install) -> None:
    install(
        "robotlab",
        {"other": "robotlab:Theirs", "plain": "robotlab:Plain", "gone": "robotlab:Gone"},
        FAMILY + "class Plain: ...\n",
    )
    for name, expected in {
        "other": "whose family is 'theirs'",
        "plain": "serve-policy --policy plain",
        "gone": "has no 'Gone'",
    }.items():
        with pytest.raises(ConfigError, match=expected):
            policy_class(name)


def test_two_packages_that_claim_one_name(install: Install) -> None:
    install("robotlab", {"theirs": "robotlab:Theirs"}, FAMILY)
    install("robotlab_fork", {"theirs": "robotlab_fork:Theirs"}, FAMILY)
    with pytest.raises(ConfigError, match=r"robotlab:Theirs, robotlab_fork:Theirs"):
        policy_class("theirs")
    assert list(installed_policies()) == ["theirs"]


def test_built_in_names_cannot_be_taken_over(install: Install) -> None:
    install("robotlab", {"statevla": "robotlab:Theirs"}, FAMILY)
    assert policy_class("statevla") is StateVLA
    assert "robotlab" not in sys.modules


def test_a_package_whose_import_fails(install: Install) -> None:
    install("robotlab", {"theirs": "robotlab:Theirs"}, "import nnumpy\n")
    with pytest.raises(ConfigError, match="robotlab imports 'nnumpy'"):
        import_entry_point("theirs")
    with pytest.raises(ConfigError, match="offers a policy 'x'; installed: theirs"):
        import_entry_point("x")
