"""What tests of several packages share."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from reflexarc.contract.errors import SimulatorError
from reflexarc.eval.libero.package import choose_renderer

# MuJoCo decides how it renders when it is first imported, whichever test does so.
with suppress(SimulatorError):
    choose_renderer()

INSTRUCTION = "pick up the alphabet soup and place it in the basket"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StateVLA with random weights and a random vision backbone: its actions mean nothing."""
    import torch

    from reflexarc.contract import FeatureStatistics, NormalizationStatistics, PolicyContract
    from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras
    from reflexarc.policy.backbones.vision import VisionBackboneConfig
    from reflexarc.policy.checkpoint import save_checkpoint
    from reflexarc.policy.language import LanguageEmbeddings
    from reflexarc.policy.statevla.config import StateVLAConfig
    from reflexarc.policy.statevla.model import StateVLA

    contract = PolicyContract(
        family="statevla",
        cameras=libero_cameras(),
        state=LIBERO_STATE_EEF,
        action=libero_action(horizon=10),
    )
    rng = np.random.default_rng(0)
    statistics = NormalizationStatistics(
        state=FeatureStatistics.from_rows(rng.normal(size=(50, 8)), contract.state.names),
        action=FeatureStatistics.from_rows(rng.uniform(-1, 1, (50, 7)), contract.action.names),
        dataset_fingerprint="random numbers",
    )
    config = StateVLAConfig(
        d_model=16,
        encoder_layers=1,
        vision=VisionBackboneConfig(name="tiny_random"),
        language_dimension=16,
        state_hidden=16,
        policy_layers=1,
        policy_mlp_hidden=16,
        gripper_hidden=16,
    )
    torch.manual_seed(0)
    language = LanguageEmbeddings([INSTRUCTION], torch.randn(1, 16), "random")
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_random"
    provenance = {"note": "tiny random weights for tests, never trained"}
    return save_checkpoint(folder, StateVLA(config, contract, language), statistics, provenance)
