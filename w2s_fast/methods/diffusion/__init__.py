"""Diffusion methods: reflection between a strong and a weak model, consistency training, compressed attention."""
