"""``reflexarc train``: being built."""
