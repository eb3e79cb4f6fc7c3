"""Episodes on disk: readers, writers and exact statistics."""

from reflexarc.data.libero_hdf5 import Episode, LiberoDataset, open_libero
from reflexarc.data.statistics import compute_statistics

__all__ = ["Episode", "LiberoDataset", "compute_statistics", "open_libero"]
