"""The `tune` command: measure per-device batch sizes with the real training step and recommend one."""
