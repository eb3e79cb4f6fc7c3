"""Numbers of an episode that must be numbers."""

from __future__ import annotations

import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.data.dataset import FloatRows


def require_finite(rows: FloatRows, episode: str, key: str, *, first_row: int = 0) -> FloatRows:
    """``rows (T, D)`` themselves.

    Args:
        episode: names file and demonstration.
        key: of the rows, as the file calls them.
        first_row: where ``rows`` begin in the file's array.

    Raises DatasetError naming the first value that is not finite, and how many there are.
    """
    if np.isfinite(rows).all():
        return rows
    bad = np.argwhere(~np.isfinite(rows))
    row, dimension = (int(i) for i in bad[0])
    raise DatasetError(
        f"{episode}: {key} is {rows[row, dimension]} at row {row + first_row}, dimension "
        f"{dimension} ({len(bad)} such values); remove or record this episode again",
        field=key,
    )
