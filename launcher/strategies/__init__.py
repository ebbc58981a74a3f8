"""DDP, FSDP2, DeepSpeed and exact mode behind one Replica interface: the forward, backward and optimizer step of one rank."""
