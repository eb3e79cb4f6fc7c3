"""``reflexarc data_collect``: being built."""
