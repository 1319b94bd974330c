"""Measurements, each with its own command (``make bench-...``); none of them is a test."""
