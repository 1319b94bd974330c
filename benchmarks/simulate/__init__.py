"""Hours of traffic through the real scheduler, without a model behind it."""
