"""Pretrained encoders behind small protocols; each has a tiny random form for tests."""
