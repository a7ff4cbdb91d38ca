"""Checkpoint formats: one file per format, its write and read pure and symmetric."""
