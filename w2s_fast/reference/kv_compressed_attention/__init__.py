"""Key-value compressed attention in plain PyTorch."""
