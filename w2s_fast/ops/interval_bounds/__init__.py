"""Interval bounds: sound boxes through layers, worst-case margins, certificates."""
