"""A policy of action chunks on frozen video tokens, a goal image and proprioception."""
