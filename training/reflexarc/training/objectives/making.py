"""From a recipe's ``objective`` to the module that computes its losses."""

from __future__ import annotations

import numpy as np
import torch

from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.interface import Policy, Task
from reflexarc.policy.mobile_vla.model import MobileVLA
from reflexarc.policy.statevla.token_layout import TokenLayout
from reflexarc.policy.vjepa2_head.model import VJEPA2Head
from reflexarc.training.config import Recipe
from reflexarc.training.config_objectives import FlowMatchingConfig, MaskedJEPAConfig
from reflexarc.training.feature_store.embedding import embed_episode
from reflexarc.training.objective import Objective
from reflexarc.training.objectives.action_chunk import ActionChunkObjective
from reflexarc.training.objectives.action_chunk_config import ActionChunkConfig
from reflexarc.training.objectives.flow_matching import FlowMatchingObjective
from reflexarc.training.objectives.masked_jepa import MaskedJEPAObjective
from reflexarc.training.objectives.temporal_jepa import TemporalJEPAObjective
from reflexarc.training.objectives.velocity_chunk import VelocityChunkObjective
from reflexarc.training.objectives.velocity_chunk_config import VelocityChunkConfig
from reflexarc.training.samples import derived_seed


def make_objective(recipe: Recipe, policy: Policy, episode: DatasetEpisode) -> Objective:
    """The objective of a recipe, on the CPU; the recipe's seed decides its weights.

    Args:
        episode: any one; its first frame shows the size of the policy's representation.

    Raises ConfigError when the policy has not what the objective trains.
    """
    config = recipe.objective
    if isinstance(config, FlowMatchingConfig):
        gripper = policy.contract.action.gripper
        if getattr(policy, "gripper_flows", False):  # one of the dimensions that flow
            gripper = None
        return FlowMatchingObjective(config, gripper.index if gripper else None)
    if isinstance(config, ActionChunkConfig):
        return _action_chunk(config, policy)
    if isinstance(config, VelocityChunkConfig):
        return _velocity_chunk(config, policy)
    if isinstance(config, MaskedJEPAConfig):
        return _masked_jepa(config, recipe, policy)
    dimension = representation_dimension(policy, episode)
    torch.manual_seed(derived_seed(recipe.training.seed, "objective", 0))
    return TemporalJEPAObjective(
        config, z_dimension=dimension, action_dimension=policy.contract.action.dimension
    )


def _action_chunk(config: ActionChunkConfig, policy: Policy) -> Objective:
    if not isinstance(policy, VJEPA2Head):
        raise ConfigError(
            f"objective.name action_chunk trains the family vjepa2_head, not {policy.family}",
            field="objective.name",
        )
    if config.static_aug > 0 and not policy.config.static_clips:
        raise ConfigError(
            f"objective.static_aug is {config.static_aug:g}, but the store holds no clips that "
            "stand still; set policy.static_clips: true",
            field="objective.static_aug",
        )
    action = policy.contract.action
    return ActionChunkObjective(
        config,
        horizon=action.horizon,
        gripper_index=action.gripper.index if action.gripper else None,
        classifies=policy.config.gripper == "bce",
    )


def _velocity_chunk(config: VelocityChunkConfig, policy: Policy) -> Objective:
    if not isinstance(policy, MobileVLA):
        raise ConfigError(
            f"objective.name velocity_chunk trains the family mobile_vla, not {policy.family}",
            field="objective.name",
        )
    return VelocityChunkObjective(config)


def _masked_jepa(config: MaskedJEPAConfig, recipe: Recipe, policy: Policy) -> Objective:
    layout = getattr(policy, "token_layout", None)
    if not isinstance(layout, TokenLayout):
        raise ConfigError(
            f"objective.name masked_jepa hides tokens of several modalities; the family "
            f"{policy.family} does not say which of its tokens are which (`token_layout`)",
            field="objective.name",
        )
    gripper = policy.contract.action.gripper
    torch.manual_seed(derived_seed(recipe.training.seed, "objective", 0))
    return MaskedJEPAObjective(
        config,
        layout=layout,
        gripper_index=gripper.index if gripper else None,
    )


@torch.inference_mode()
def representation_dimension(policy: Policy, episode: DatasetEpisode) -> int:
    """K·d of ``policy.representation``, as it comes out for one frame."""
    representation = getattr(policy, "representation", None)
    if representation is None:
        raise ConfigError(
            f"objective.name temporal_jepa trains a module `representation`, which the family "
            f"{policy.family} has not",
            field="objective.name",
        )
    policy.eval()
    device, history = policy.device, policy.contract.history
    task = policy.embed_task([Task(instruction=episode.instruction)])
    frame = embed_episode(policy, episode, np.zeros(1, dtype=np.int64))
    window = {
        name: rows.to(device).unsqueeze(1).expand(1, history.frames, *rows.shape[1:])
        for name, rows in frame.items()
    }
    state = policy.contract.state.dimension
    window["state"] = torch.zeros(1, history.states, state, device=device)
    valid = torch.ones(1, history.rows, dtype=torch.bool, device=device)
    z = representation(task, window, valid)
    return int(z[0].numel())
