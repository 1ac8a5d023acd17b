"""Methods for mixtures of experts."""
