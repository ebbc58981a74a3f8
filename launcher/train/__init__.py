"""One rank's training: building the model and data, the training loop, validation and checkpointing.

`session.run_session` takes a rank from the process group to the final event; `loop.train` is the training loop, which
works with a `TrainContext` and a `TrainState`. `verify.verify` checks a recipe's gradients in one process.
"""
