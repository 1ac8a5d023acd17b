"""Fine-tuning and pre-training with few numbers: projected moments, adapters, pruned weights."""
