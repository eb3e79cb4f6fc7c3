"""The feature store: what the frozen front of a policy makes of every frame, once, on disk."""
