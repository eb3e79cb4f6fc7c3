"""What ``reflexarc doctor`` looks at. Nothing here imports more than the base install has."""
