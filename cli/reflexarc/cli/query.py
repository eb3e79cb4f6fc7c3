"""``reflexarc query``: being built."""
