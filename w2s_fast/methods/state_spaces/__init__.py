"""Methods of state space models."""
