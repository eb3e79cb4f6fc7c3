"""A StateVLA small enough to build in milliseconds, and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reflexarc.contract import (
    FeatureStatistics,
    NormalizationStatistics,
    Observation,
    PolicyContract,
)
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras
from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.checkpoint import save_checkpoint
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.model import StateVLA

INSTRUCTIONS = ("pick up the milk", "pick up the butter")


@pytest.fixture
def contract() -> PolicyContract:
    """LIBERO's, with images of 64 pixels and chunks of 5."""
    return PolicyContract(
        family="statevla",
        cameras=libero_cameras(size=64, source_size=64),
        state=LIBERO_STATE_EEF,
        action=libero_action(5),
    )


@pytest.fixture
def config() -> StateVLAConfig:
    return StateVLAConfig(
        d_model=32,
        encoder_layers=2,
        latent_tokens=2,
        vision=VisionBackboneConfig(name="tiny_random", pool=2),
        language_dimension=16,
        state_hidden=16,
        policy_layers=2,
        policy_d_state=8,
        policy_mlp_hidden=32,
        gripper_hidden=16,
    )


@pytest.fixture
def embeddings() -> LanguageEmbeddings:
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    return LanguageEmbeddings(INSTRUCTIONS, vectors, "random")


@pytest.fixture
def policy(
    config: StateVLAConfig, contract: PolicyContract, embeddings: LanguageEmbeddings
) -> StateVLA:
    torch.manual_seed(0)
    return StateVLA(config, contract, embeddings).eval()


@pytest.fixture
def statistics(contract: PolicyContract) -> NormalizationStatistics:
    random = np.random.default_rng(5)
    actions = random.uniform(-0.8, 0.8, (200, 7))
    actions[:, 6] = np.where(random.random(200) < 0.7, -1.0, 1.0)
    return NormalizationStatistics(
        state=FeatureStatistics.from_rows(random.normal(0.3, 0.7, (200, 8)), contract.state.names),
        action=FeatureStatistics.from_rows(actions, contract.action.names),
        dataset_fingerprint="of the tests",
    )


@pytest.fixture
def saved(tmp_path: Path, policy: StateVLA, statistics: NormalizationStatistics) -> Path:
    return save_checkpoint(tmp_path / "policy", policy, statistics, {"recipe": "tiny", "seed": 0})


@pytest.fixture
def observe(contract: PolicyContract) -> Callable[..., Observation]:
    """``observe(number, **fields)``: a random observation, the same for the same number."""

    def make(number: int, **fields: object) -> Observation:
        random = np.random.default_rng(number)
        given: dict[str, object] = {
            "images": {
                camera.name: random.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
                for camera in contract.cameras
            },
            "state": random.normal(size=contract.state.dimension),
            "instruction": INSTRUCTIONS[0],
            "seed": number,
        }
        return Observation(**{**given, **fields})  # type: ignore[arg-type]

    return make
