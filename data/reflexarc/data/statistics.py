"""Exact statistics of a dataset's states and actions."""

from __future__ import annotations

import numpy as np

from reflexarc.contract.errors import DatasetError
from reflexarc.contract.statistics import FeatureStatistics, NormalizationStatistics
from reflexarc.data.dataset import EpisodeDataset, Labels


def compute_statistics(
    dataset: EpisodeDataset, layout: str, *, labels: Labels = "executed"
) -> NormalizationStatistics:
    """Statistics over every aligned step of every episode, in float64.

    Those of the action are of the ``labels`` that a policy learns. Every step counts once, whether
    or not an image was rendered at it, and whatever the weight of its episode. DatasetError names
    file, demo and key of a value that is missing or not finite.
    """
    if not dataset.episodes:
        raise DatasetError("no episodes to compute statistics from")
    state_names = dataset.state_spec(layout).names
    states = np.concatenate([episode.states(layout) for episode in dataset.episodes])
    actions = np.concatenate([e.labelled_actions(labels) for e in dataset.episodes])
    return NormalizationStatistics(
        state=FeatureStatistics.from_rows(states, state_names),
        action=FeatureStatistics.from_rows(actions, dataset.action_spec(1).names),
        dataset_fingerprint=dataset.fingerprint(),
    )
