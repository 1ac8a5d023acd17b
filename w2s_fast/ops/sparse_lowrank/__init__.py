"""Sparse-plus-low-rank products (SLTrain, arXiv 2406.02214): W = scale B A + S, S with a fixed random support."""
