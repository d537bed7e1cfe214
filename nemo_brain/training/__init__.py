"""Trainings: the frame that all kinds share, and one room for each kind."""

from nemo_brain.host import versions

# Before anything imports NeMo, which would fail on another version with an error that does not name it.
versions.check(versions.installed())
