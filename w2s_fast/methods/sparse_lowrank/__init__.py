"""Training with weights that are low rank plus sparse."""
