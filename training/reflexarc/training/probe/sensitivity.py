"""How much z and the chunk move when one modality is another sample's and the rest stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from reflexarc.contract.errors import ConfigError
from reflexarc.data.dataset import DatasetEpisode
from reflexarc.policy.checkpoint import LoadedPolicy
from reflexarc.policy.interface import Policy, Task, Tensors
from reflexarc.training.feature_store.embedding import prepare_frames
from reflexarc.training.probe.inputs import representation_of

LANGUAGE, STATE, EVERYTHING = "language", "state", "everything"
HEARD = 1e-4
"""The least share of the change by everything that counts: less is rounding, or as good as none."""
_NOTHING = 1e-9
_BATCH = 16


@dataclass(frozen=True)
class Moments:
    """What the policy is shown at N moments: rows of every tensor belong together.

    Attributes:
        images: camera name to ``uint8 (N, H, W, 3)`` as the contract states.
        state: ``float32 (N, S)`` normalised.
        task: ``int64 (N,)`` index into ``instructions``.
    """

    images: Tensors
    state: Tensor
    task: Tensor
    instructions: tuple[str, ...]

    @property
    def several_instructions(self) -> bool:
        return len(set(self.task.tolist())) > 1

    def with_other(self, modality: str, partner: Tensor) -> Moments:
        """The same moments with one modality, or all, of the rows ``partner``."""
        everything = modality == EVERYTHING
        return replace(
            self,
            images={
                name: rows[partner] if everything or modality == name else rows
                for name, rows in self.images.items()
            },
            state=self.state[partner] if everything or modality == STATE else self.state,
            task=self.task[partner] if everything or modality == LANGUAGE else self.task,
        )


@dataclass(frozen=True)
class Sensitivity:
    """Of one modality, on average over moments.

    Attributes:
        z: root mean squared change of a number of z.
        z_share: the same over that of swapping everything.
        action: mean absolute change of a number of the chunk without the gripper, in the units of
            the robot's action.
        action_share: the same over that of swapping everything.
        gripper: share of gripper commands that are others; None without a gripper.
    """

    modality: str
    z: float
    z_share: float
    action: float
    action_share: float
    gripper: float | None

    @property
    def moves(self) -> bool:
        """Whether both z and the chunk listen to this modality."""
        return self.z_share > HEARD and self.action_share > HEARD


def choose_moments(
    loaded: LoadedPolicy, episodes: Sequence[DatasetEpisode], count: int, seed: int
) -> Moments:
    """``count`` rendered frames at random, or all where there are fewer.

    Raises ConfigError for fewer than two, or a policy that sees more than one frame.
    """
    contract = loaded.policy.contract
    representation_of(loaded.policy)
    if (contract.history.frames, contract.history.states) != (1, 1):
        raise ConfigError(
            f"the sensitivity is measured for policies that see one frame and one state, this one "
            f"sees {contract.history.frames} and {contract.history.states}",
            field="history",
        )
    pool = [(i, j) for i, e in enumerate(episodes) for j in range(len(e.image_steps))]
    if len(pool) < 2:
        raise ConfigError("two frames are needed to swap what is seen", field="data")
    random = np.random.default_rng(seed)
    chosen = sorted(random.choice(len(pool), min(count, len(pool)), replace=False))
    instructions = tuple(sorted({episode.instruction for episode in episodes}))
    images: dict[str, list[Tensor]] = {name: [] for name in contract.camera_names}
    states, tasks = [], []
    for place in sorted({pool[row][0] for row in chosen}):
        episode = episodes[place]
        frames = np.array([pool[row][1] for row in chosen if pool[row][0] == place])
        for name, rows in prepare_frames(contract, episode, frames).items():
            images[name].append(rows)
        steps = np.asarray(episode.image_steps)[frames]
        states.append(episode.states(contract.state.layout)[steps])
        tasks += [instructions.index(episode.instruction)] * len(frames)
    return Moments(
        images={name: torch.cat(rows) for name, rows in images.items()},
        state=loaded.processor.normalize_state(np.concatenate(states)),
        task=torch.tensor(tasks),
        instructions=instructions,
    )


@torch.inference_mode()
def measure_sensitivity(loaded: LoadedPolicy, moments: Moments, seed: int) -> list[Sensitivity]:
    """One for each modality, then one for ``everything``; the same noise throughout.

    ``language`` is left out where all moments have one instruction: there is nothing to swap.
    """
    partner = _partners(moments.task, seed)
    cameras = loaded.policy.contract.camera_names
    modalities = [*([LANGUAGE] if moments.several_instructions else []), STATE, *cameras]
    before = _answers(loaded, moments, seed)
    after = {
        name: _answers(loaded, moments.with_other(name, partner), seed)
        for name in (*modalities, EVERYTHING)
    }
    changes = {name: _change(loaded.policy, before, values) for name, values in after.items()}
    z_of_all, action_of_all, _ = changes[EVERYTHING]
    return [
        Sensitivity(
            modality=name,
            z=z,
            z_share=z / max(z_of_all, _NOTHING),
            action=action,
            action_share=action / max(action_of_all, _NOTHING),
            gripper=gripper,
        )
        for name, (z, action, gripper) in changes.items()
    ]


def _partners(task: Tensor, seed: int) -> Tensor:
    """For each moment another one, of another task where there is one."""
    generator = torch.Generator().manual_seed(seed)
    others = (task[:, None] != task).float()
    same = (1 - torch.eye(len(task))) * (others.sum(1, keepdim=True) == 0)
    return torch.multinomial(others + same, 1, generator=generator)[:, 0]


def _answers(loaded: LoadedPolicy, moments: Moments, seed: int) -> tuple[Tensor, Tensor]:
    """z ``(N, K·d)`` and chunks ``(N, H, D)`` in the units of the robot."""
    policy = loaded.policy
    sampling, device = policy.sampling, policy.device
    count = len(moments.state)
    noise = None
    if sampling.noise_shape is not None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, *sampling.noise_shape, generator=generator)
    tasks = policy.embed_task([Task(instruction=text) for text in moments.instructions])
    z, chunks = [], []
    for start in range(0, count, _BATCH):
        rows = slice(start, min(start + _BATCH, count))
        of_task = {name: t[moments.task[rows].to(device)] for name, t in tasks.items()}
        images = {name: t[rows].to(device) for name, t in moments.images.items()}
        window = {n: t.unsqueeze(1) for n, t in policy.embed_frames(images, of_task).items()}
        window["state"] = moments.state[rows].unsqueeze(1).to(device)
        valid = torch.ones(len(window["state"]), 1, dtype=torch.bool, device=device)
        context = policy.encode(of_task, window, valid)
        drawn = None if noise is None else noise[rows].to(device)
        sampled = policy.sample_actions(context, drawn, steps=sampling.default_steps)
        z.append(_flat(context))
        chunks.append(torch.from_numpy(loaded.processor.actions_to_robot(sampled)))
    return torch.cat(z), torch.cat(chunks)


def _flat(context: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([context[name].float().flatten(1).cpu() for name in sorted(context)], dim=1)


def _change(
    policy: Policy, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> tuple[float, float, float | None]:
    """Of z, of the chunk's motion, and of the gripper's commands."""
    z = (after[0] - before[0]).square().mean().sqrt().item()
    moved = (after[1] - before[1]).abs()
    gripper = policy.contract.action.gripper
    if gripper is None:
        return z, moved.mean().item(), None
    motion = [i for i in range(moved.shape[-1]) if i != gripper.index]
    middle = (gripper.open + gripper.closed) / 2
    closes, closed = (chunk[..., gripper.index] > middle for chunk in (after[1], before[1]))
    flipped = (closes != closed).float().mean().item()
    return z, moved[..., motion].mean().item(), flipped
