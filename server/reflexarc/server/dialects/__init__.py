"""Foreign and own message forms, each turned into an Observation and back.

Functions here are synchronous, run in the worker thread, and raise only named errors.
"""
