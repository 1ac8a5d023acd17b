"""Logit fusion in plain PyTorch."""
