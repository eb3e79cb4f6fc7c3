"""``reflexarc demo``: being built."""
