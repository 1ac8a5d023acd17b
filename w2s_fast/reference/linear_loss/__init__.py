"""Linear losses in plain PyTorch: definitions, oracle and fallback."""
