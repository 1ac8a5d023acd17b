"""What the methods share: text every machine has, small language models, a cache, progress on stderr."""
