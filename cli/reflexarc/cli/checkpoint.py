"""``reflexarc checkpoint``: being built."""
