"""Does a representation see? Linear probes, skill against no change, collapse, a picture."""
