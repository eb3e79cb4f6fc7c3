"""Episodes on disk: readers, writers and exact statistics."""

from reflexarc.data.libero_episode import Episode
from reflexarc.data.libero_hdf5 import LiberoDataset, open_libero
from reflexarc.data.statistics import compute_statistics

__all__ = ["Episode", "LiberoDataset", "compute_statistics", "open_libero"]
