"""Decoding-time methods: a large model steered by small ones."""
