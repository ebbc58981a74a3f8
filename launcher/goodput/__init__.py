"""The gradient noise scale, throughput and update-time models, and the batch sizes chosen from them."""
