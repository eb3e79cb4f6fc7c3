"""Episodes on disk: readers, writers and exact statistics."""
