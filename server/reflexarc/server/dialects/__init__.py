"""Foreign and own message forms, each turned into an Observation and back.

Functions here are pure and raise only named errors.
"""
