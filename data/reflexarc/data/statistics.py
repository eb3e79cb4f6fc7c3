"""Exact statistics of a dataset's states and actions."""

from __future__ import annotations

import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.policy_contract import LIBERO_STATES, libero_action
from reflexarc.contract.statistics import FeatureStatistics, NormalizationStatistics
from reflexarc.data.libero_episode import Labels
from reflexarc.data.libero_hdf5 import LiberoDataset


def compute_statistics(
    dataset: LiberoDataset, layout: str, *, labels: Labels = "executed"
) -> NormalizationStatistics:
    """Statistics over every aligned step of every episode, in float64.

    Those of the action are of the ``labels`` that a policy learns. Every step counts once, whether
    or not an image was rendered at it. DatasetError names file, demo and key of a value that is
    missing or not finite.
    """
    if not dataset.episodes:
        raise DatasetError("no episodes to compute statistics from")
    if layout not in LIBERO_STATES:
        raise DatasetError(
            f"state layout {layout!r} is unknown; known: {', '.join(LIBERO_STATES)}", field="layout"
        )
    states = np.concatenate([episode.states(layout) for episode in dataset.episodes])
    actions = np.concatenate([e.labelled_actions(labels) for e in dataset.episodes])
    return NormalizationStatistics(
        state=FeatureStatistics.from_rows(states, LIBERO_STATES[layout].names),
        action=FeatureStatistics.from_rows(actions, libero_action(1).names),
        dataset_fingerprint=dataset.fingerprint(),
    )
