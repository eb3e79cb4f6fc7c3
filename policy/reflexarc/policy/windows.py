"""Windows of past rows: which rows a decision sees, and which of them are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reflexarc.contract.policy_contract import History
from reflexarc.policy.interface import Policy, Tensors


def pad_window(
    history: History,
    steps: Sequence[int],
    frames: Sequence[Mapping[int, Tensors]],
    states: Sequence[Mapping[int, Tensor]],
) -> tuple[Tensors, Tensor]:
    """``encode``'s window and ``valid (B, T)`` of B decisions.

    Args:
        history: lengths and stride.
        steps: environment step of each decision.
        frames: for each decision step to one row ``(...)`` of ``embed_frames``.
        states: for each decision step to a normalised state ``(S,)``.
    """
    frame_steps = [_padded(history.frame_steps(step), history.frames) for step in steps]
    state_steps = [_padded(history.state_steps(step), history.states) for step in steps]
    window = {
        name: torch.stack([torch.stack([rows[step][name] for step in wanted])
                           for rows, wanted in zip(frames, frame_steps, strict=True)])
        for name in next(iter(frames[0].values()))
    }  # fmt: skip
    window["state"] = torch.stack(
        [
            torch.stack([rows[step] for step in wanted])
            for rows, wanted in zip(states, state_steps, strict=True)
        ]
    )
    age = torch.arange(history.rows - 1, -1, -1) * history.stride
    valid = torch.tensor(steps)[:, None] >= age
    return window, valid.to(window["state"].device)


def with_clips(policy: Policy, window: Tensors, valid: Tensor) -> Tensors:
    """The window that ``policy.encode`` wants: with its frames embedded together, or as it is."""
    if not policy.embeds_clips:
        return window
    frames = {name: rows for name, rows in window.items() if name != "state"}
    clips = policy.embed_clips(frames, valid[:, -policy.contract.history.frames :])
    return {**{name: rows.unsqueeze(1) for name, rows in clips.items()}, "state": window["state"]}


def join_rows(rows: Sequence[Tensors]) -> Tensors:
    """Rows ``(1, ...)`` of single tasks as one batch ``(N, ...)``."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _padded(steps: list[int], length: int) -> list[int]:
    """The oldest step repeated at the start, up to ``length``."""
    return [steps[0]] * (length - len(steps)) + steps
