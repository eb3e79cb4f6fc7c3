"""The state of every global random generator as a function of the run's seed and the step.

So no generator's state has to be saved: a step begins with the same one whether the run was
resumed before it or not. Noise and times of an objective come from a generator of their own and
are drawn for the whole batch (:mod:`reflexarc.training.shares`); what is seeded here is left to
layers that draw by themselves, such as dropout, and differs between processes, as their rows do.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from reflexarc.training.samples import derived_seed


def seed_generators(seed: int, step: int, *, part: int = 0, rank: int = 0) -> None:
    """Seed torch on every device, numpy and Python for one part of a step on one process."""
    purpose = f"dropout/{part}/{rank}" if part or rank else "dropout"
    derived = derived_seed(seed, purpose, step)
    torch.manual_seed(derived)
    np.random.seed(derived % 2**32)
    random.seed(derived)
