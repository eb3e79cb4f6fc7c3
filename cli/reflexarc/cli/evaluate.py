"""``reflexarc evaluate``: being built."""
