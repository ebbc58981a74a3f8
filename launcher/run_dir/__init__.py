"""The run directory: its files, lock, restarts and failures, and the rules for resuming in it."""
