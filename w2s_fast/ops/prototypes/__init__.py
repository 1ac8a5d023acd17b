"""Prototypes."""
