"""Trackers that cannot be used."""


class TrackerError(Exception):
    """A tracker that does not take what is sent to it, and why."""
