"""Certified training and what certified bounds are used for."""
