"""Every op in plain PyTorch: its definition, the tests' oracle (in float64), and the fallback on any device."""
