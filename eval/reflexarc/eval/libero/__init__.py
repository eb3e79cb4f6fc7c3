"""LIBERO: its tasks, its simulator rendered on demand, a scripted expert, demonstrations."""
