"""Mixtures of two experts, gated by how sure one of them is."""
