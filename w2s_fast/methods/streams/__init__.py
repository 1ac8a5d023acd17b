"""Recipes for streams of data: samplers, schedules and mixtures as methods over the user's model and data."""
