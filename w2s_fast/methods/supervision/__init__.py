"""Learning from a supervisor weaker than the student."""
