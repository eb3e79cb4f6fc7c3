"""``reflexarc data_inspect``: being built."""
