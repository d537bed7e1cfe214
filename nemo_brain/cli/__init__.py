"""The command ``nemo-brain``: one file for each of its commands that is more than a call."""
