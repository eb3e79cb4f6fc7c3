"""The command line. Thin: imports lazily, and nobody imports it."""
