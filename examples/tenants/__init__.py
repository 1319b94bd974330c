"""Two organizations on one server."""
