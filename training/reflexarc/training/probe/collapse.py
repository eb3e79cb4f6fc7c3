"""Whether a representation has collapsed: spread of its dimensions, rank, likeness of pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from reflexarc.training.probe.ridge import Floats

_PAIRS = 20_000
_DEAD = 1e-2
_ROUNDING = 1e-6  # of fp32, in which z is computed


@dataclass(frozen=True)
class Collapse:
    """Of z ``(n, D)`` over n frames.

    Attributes:
        dimensions: D.
        std_min, std_median, std_max: of a dimension over frames.
        dead_dimensions: those with less than a hundredth of the median's deviation.
        rankme: exp of the entropy of z's normalised singular values (Garrido et al., arXiv
            2210.02885); 1 for a constant, at most D.
        effective_rank: the same of z minus its mean, which a large constant part cannot lower.
        mean_cosine: of random pairs of different frames; 1 when all point the same way.
        mean_cosine_centred: the same of z minus its mean; near 0 in a healthy representation.
    """

    dimensions: int
    std_min: float
    std_median: float
    std_max: float
    dead_dimensions: int
    rankme: float
    effective_rank: float
    mean_cosine: float
    mean_cosine_centred: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure_collapse(z: Floats, *, seed: int = 0) -> Collapse:
    """``z (n, D)`` with at least two rows."""
    z = np.asarray(z, dtype=np.float64)
    deviations = z.std(0)
    constant = deviations <= _ROUNDING * np.abs(z).max()
    centred = np.where(constant, 0.0, z - z.mean(0))
    median = float(np.median(deviations))
    return Collapse(
        dimensions=z.shape[1],
        std_min=float(deviations.min()),
        std_median=median,
        std_max=float(deviations.max()),
        dead_dimensions=int((constant | (deviations <= _DEAD * median)).sum()),
        rankme=effective_rank(z),
        effective_rank=effective_rank(centred),
        mean_cosine=mean_cosine(z, seed=seed),
        mean_cosine_centred=mean_cosine(centred, seed=seed),
    )


def effective_rank(z: Floats) -> float:
    """exp of the entropy of the singular values of ``z (n, D)`` as shares of their sum.

    1 for a matrix of zeros.
    """
    # Square roots of the eigenvalues of the smaller Gram matrix: cheaper than an SVD.
    gram = z.T @ z if z.shape[1] <= z.shape[0] else z @ z.T
    eigenvalues = np.linalg.eigvalsh(gram)
    # Rounding leaves eigenvalues of about this size where exact arithmetic has zeros.
    noise = eigenvalues.max() * np.finfo(np.float64).eps * len(gram)
    singular = np.sqrt(eigenvalues[eigenvalues > noise])
    if not len(singular):
        return 1.0
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(z: Floats, *, seed: int = 0) -> float:
    """Mean cosine of random pairs of different rows of ``z (n, D)``; zero rows count 0."""
    random = np.random.default_rng(seed)
    first = random.integers(len(z), size=_PAIRS)
    second = (first + random.integers(1, len(z), size=_PAIRS)) % len(z)
    norms = np.linalg.norm(z, axis=1)
    unit = z / np.where(norms == 0, 1.0, norms)[:, None]
    return float((unit[first] * unit[second]).sum(1).mean())
