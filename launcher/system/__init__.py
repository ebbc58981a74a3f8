"""Files, processes, text and secrets: building blocks that know nothing about training."""
