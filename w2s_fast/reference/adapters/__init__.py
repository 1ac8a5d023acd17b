"""Linear layers with adapters in plain PyTorch."""
