"""One rank's training: building the model and data, the training loop, validation, checkpointing."""
