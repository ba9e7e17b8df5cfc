"""Scores of images, and what a run's results are read from."""
