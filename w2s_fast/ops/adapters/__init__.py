"""Linear layers with adapters: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353)."""
