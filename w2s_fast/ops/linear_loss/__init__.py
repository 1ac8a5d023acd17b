"""Losses over a vocabulary that take hidden states and heads, so that the [T, V] logits are never formed."""
