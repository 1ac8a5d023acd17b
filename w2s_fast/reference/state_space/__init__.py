"""State spaces."""
