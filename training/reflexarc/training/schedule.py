"""The learning rate as a pure function of the step, so that resuming needs no saved schedule."""

from __future__ import annotations

import math

from reflexarc.training.config import ScheduleConfig

_ONE_CYCLE_START = 1 / 25


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate at optimiser step ``step`` (from 0) of ``total_steps``."""
    share = round(config.warmup_fraction * total_steps)
    warmup = share if config.warmup_steps is None else config.warmup_steps
    if config.name == "constant":
        return min(1.0, (step + 1) / (warmup + 1))
    if config.name == "cosine":
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return _cosine(1.0, config.final_fraction, step - warmup, total_steps - warmup)
    rising = max(1, share)
    if step < rising:
        return _cosine(_ONE_CYCLE_START, 1.0, step, rising)
    return _cosine(1.0, config.final_fraction, step - rising, total_steps - rising)


def _cosine(start: float, end: float, step: int, steps: int) -> float:
    progress = min(1.0, step / max(1, steps))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
