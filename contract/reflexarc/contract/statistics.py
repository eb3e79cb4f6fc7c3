"""Per-dimension statistics of a dataset's states and actions, and the normalisation they give."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from reflexarc.contract.policy_contract import FrozenModel, NormalizationMode

FloatArray = npt.NDArray[np.floating]
_MINIMUM_SCALE = 1e-6


class FeatureStatistics(FrozenModel):
    """Exact statistics of one feature over ``count`` rows, one number a dimension.

    ``q01`` and ``q99`` are the 1st and 99th percentile; ``std`` is the population's.
    """

    names: tuple[str, ...]
    count: Annotated[int, Field(gt=0)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> FeatureStatistics:
        for name in ("mean", "std", "min", "max", "q01", "q99"):
            values = getattr(self, name)
            if len(values) != len(self.names):
                raise ValueError(f"{name} has {len(values)} values for {len(self.names)} names")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite: {values}")
        return self

    @classmethod
    def from_rows(cls, rows: FloatArray, names: tuple[str, ...]) -> FeatureStatistics:
        """Exact statistics of ``rows (N, D)``, computed in float64."""
        rows = np.asarray(rows, dtype=np.float64)
        q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
        return cls(
            names=names,
            count=len(rows),
            mean=tuple(rows.mean(0).tolist()),
            std=tuple(rows.std(0).tolist()),
            min=tuple(rows.min(0).tolist()),
            max=tuple(rows.max(0).tolist()),
            q01=tuple(q01.tolist()),
            q99=tuple(q99.tolist()),
        )

    def shift_and_scale(
        self, mode: NormalizationMode
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """``(shift, scale)``, each ``(D,)`` float64: normalised = (raw - shift) / scale.

        ``mean_std`` gives mean 0 and deviation 1; ``min_max`` and ``q01_q99`` map their range
        to [-1, 1]. A constant dimension keeps scale 1, so that it normalises to 0.
        """
        if mode == "identity":
            return np.zeros(len(self.names)), np.ones(len(self.names))
        if mode == "mean_std":
            shift, scale = np.array(self.mean), np.array(self.std)
        else:
            low, high = (self.min, self.max) if mode == "min_max" else (self.q01, self.q99)
            shift = (np.array(low) + np.array(high)) / 2
            scale = (np.array(high) - np.array(low)) / 2
        return shift, np.where(scale < _MINIMUM_SCALE, 1.0, scale)


class NormalizationStatistics(FrozenModel):
    """The statistics that a checkpoint carries as ``norm_stats.json``."""

    state: FeatureStatistics
    action: FeatureStatistics
    dataset_fingerprint: str

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    def sha256(self) -> str:
        """Hash of the canonical JSON; stands in the contract."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> NormalizationStatistics:
        return cls.model_validate_json(path.read_text())
