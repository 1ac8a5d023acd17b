"""Learning from preferences, from one's own samples and from what to forget."""
