"""Trainings: the frame that all kinds share, and one room for each kind."""
