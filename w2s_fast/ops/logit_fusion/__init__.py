"""Logit fusion: one large model's logits combined with those of small experts, at decoding or scoring time."""
