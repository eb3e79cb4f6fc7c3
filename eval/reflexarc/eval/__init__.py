"""The LIBERO simulator: client, scripted expert, baselines, statistics."""
