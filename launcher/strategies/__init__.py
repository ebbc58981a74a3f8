"""The parallel strategies: DDP, FSDP2, DeepSpeed and exact mode, behind one interface.

A `Replica` is one rank's part of the model and its optimizer: it runs the forward, backward and
optimizer step, and gives and loads the state for checkpoints. `build_replica` makes the configured one.
"""
