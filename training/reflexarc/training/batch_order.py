"""The order in which a run sees its samples, and the seeds that follow from a run's own."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class BatchOrder:
    """Which samples each optimiser step sees: a seeded permutation an epoch.

    A pure function of seed and step, so that a resumed run sees the same batches. Every sample is
    seen once an epoch, without replacement; the last batch of an epoch may be smaller.

    A sample of weight w is seen w times an epoch. Samples of one weight are dealt from one
    permutation after another, each begun only when the one before is used up, so that over 1 / w
    epochs a sample of weight w < 1 is seen once, and one of weight 0 never.

    Args:
        samples: how many there are.
        weights: ``float64 (samples,)``; None where all are 1.
    """

    def __init__(
        self, samples: int, batch_size: int, seed: int, weights: Tensor | None = None
    ) -> None:
        self.samples = samples
        self._seed = seed
        self._pools: list[tuple[Tensor, int]] = []
        if weights is not None:
            for weight in sorted(set(weights.tolist()) - {0.0}):
                members = torch.nonzero(weights == weight).flatten()
                self._pools.append((members, max(1, round(weight * len(members)))))
        self.epoch_samples = sum(dealt for _, dealt in self._pools) or samples
        self.batch_size = min(batch_size, self.epoch_samples)
        self.steps_per_epoch = -(-self.epoch_samples // self.batch_size)
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Sample indices of optimiser step ``step``, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = seeded_generator(self._seed, "order", epoch)
            permutation = torch.randperm(self.epoch_samples, generator=generator)
            self._permutation = self._dealt(epoch)[permutation] if self._pools else permutation
            self._epoch = epoch
        start = position * self.batch_size
        return self._permutation[start : start + self.batch_size]

    def _dealt(self, epoch: int) -> Tensor:
        """``(epoch_samples,)``: what each pool deals in this epoch, pool after pool."""
        parts = []
        for number, (members, dealt) in enumerate(self._pools):
            first, last = epoch * dealt, (epoch + 1) * dealt
            rounds = range(first // len(members), -(-last // len(members)))
            dealing = torch.cat([self._round(number, members, index) for index in rounds])
            start = first - rounds.start * len(members)
            parts.append(dealing[start : start + dealt])
        return torch.cat(parts)

    def _round(self, pool: int, members: Tensor, index: int) -> Tensor:
        generator = seeded_generator(self._seed, f"order/{pool}", index)
        return members[torch.randperm(len(members), generator=generator)]


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """A seed in [0, 2**63) for one purpose and index of a run."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seeded_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))
