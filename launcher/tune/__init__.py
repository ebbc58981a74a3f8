"""The verb `tune`: per-device batch sizes measured with the real training step, and one of them recommended."""
