"""Interval bounds in plain PyTorch: the definitions, and the kernels of last resort."""
