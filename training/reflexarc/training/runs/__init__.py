"""Runs on disk: which there are, how they stand, how to stop one. Nothing here needs torch."""
