"""What the distribution promises: a namespace package, a light base install, whole archives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("contract", "client", "data", "policy", "training", "server", "eval", "cli")


@pytest.mark.parametrize("package", PACKAGES)
def test_namespace_has_no_init(package: str) -> None:
    assert (ROOT / package / "reflexarc" / package / "__init__.py").is_file()
    assert not (ROOT / package / "reflexarc" / "__init__.py").exists()


def test_client_and_contract_import_nothing_heavy() -> None:
    code = (
        "import sys, pkgutil, importlib\n"
        "for name in ('reflexarc.contract', 'reflexarc.client'):\n"
        "    package = importlib.import_module(name)\n"
        "    for module in pkgutil.walk_packages(package.__path__, name + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "heavy = {'torch', 'h5py', 'fastapi', 'transformers', 'mujoco'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
