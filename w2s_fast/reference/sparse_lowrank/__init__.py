"""Sparse-plus-low-rank products in plain PyTorch: W = scale B A + S with a fixed support."""
