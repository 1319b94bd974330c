"""Experiment trackers: what is written of a job, and the writers for each of them."""
