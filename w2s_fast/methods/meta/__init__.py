"""Methods that learn to learn."""
