"""Key-value compressed attention (PixArt-Sigma, arXiv 2403.04692): fewer keys and values, full queries."""
