"""The objectives that recipes name."""
