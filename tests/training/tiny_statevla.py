"""A StateVLA that trains in milliseconds, and random samples for it.

No test file, so that scripts which tests start as processes can import it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reflexarc.contract import PolicyContract
from reflexarc.contract.policy_contract import LIBERO_STATE_EEF, libero_action, libero_cameras
from reflexarc.policy.backbones.vision import VisionBackboneConfig
from reflexarc.policy.language import LanguageEmbeddings
from reflexarc.policy.layers.keypoints import KeypointsConfig
from reflexarc.policy.statevla.config import StateVLAConfig
from reflexarc.policy.statevla.model import StateVLA
from reflexarc.training.samples import BatchSource, FutureTable, SampleTable

HORIZON, LANGUAGE, Z_DIMENSION, ACTION_DIMENSION = 5, 16, 2 * 16, 7


def tiny_statevla(
    keypoints: KeypointsConfig | None = None, *, bidirectional: bool = False
) -> StateVLA:
    """Two cameras of 64 pixels, chunks of ``HORIZON`` actions; the same weights at every call."""
    torch.manual_seed(0)
    contract = PolicyContract(
        family="statevla",
        cameras=libero_cameras(size=64, source_size=64),
        state=LIBERO_STATE_EEF,
        action=libero_action(HORIZON),
    )
    config = StateVLAConfig(
        d_model=16,
        encoder_layers=2,
        latent_tokens=2,
        vision=VisionBackboneConfig(name="tiny_random", pool=2),
        keypoints=keypoints,
        bidirectional=bidirectional,
        language_dimension=LANGUAGE,
        state_hidden=16,
        policy_layers=1,
        policy_d_state=8,
        policy_mlp_hidden=16,
        gripper_hidden=16,
    )
    language = LanguageEmbeddings(["go"], torch.randn(1, LANGUAGE), "random")
    return StateVLA(config, contract, language)


def random_source(
    policy: StateVLA, *, seed: int, real_steps: Tensor, future_is_real: Tensor, ahead: int
) -> BatchSource:
    """Random samples, a function of ``seed`` alone.

    Args:
        real_steps: ``int64 (N,)``, actions of each chunk that are not padding.
        future_is_real: ``bool (N,)``, False where a sample has no future.
        ahead: control steps to the future, ``HORIZON`` at most.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(real_steps)

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    images = {
        name: torch.randint(0, 256, (2 * rows, 64, 64, 3), dtype=torch.uint8, generator=generator)
        for name in policy.contract.camera_names
    }
    with torch.no_grad():
        features = policy.embed_frames(images, {})
    actions = random(HORIZON, ACTION_DIMENSION)
    actions[..., 6] = actions[..., 6].sign()
    frame_row = torch.arange(rows)[:, None]
    valid = torch.ones(rows, 1, dtype=torch.bool)
    samples = SampleTable(
        state=random(1, 8),
        actions=actions,
        action_mask=torch.arange(HORIZON) < real_steps[:, None],
        frame_row=frame_row,
        valid=valid,
        task_row=torch.arange(rows),
        future=FutureTable(
            state=random(1, 8),
            frame_row=rows + frame_row,
            valid=valid,
            exists=future_is_real,
            actions=actions[:, :ahead],
        ),
    )
    return BatchSource(samples, features, {"language": random(LANGUAGE)})
