"""``reflexarc serve``: being built."""
