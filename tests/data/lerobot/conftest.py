"""Where the real samples lie; tests that need them are skipped where they do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    beside = Path(__file__).parents[3].parent / "shared" / "data"
    folder = Path(os.environ.get("REFLEXARC_SHARED_DATA", beside))
    if not (folder / "lerobot_v2.0_gr1_picknplace").is_dir():
        pytest.skip("the shared sample data is not here")
    return folder
