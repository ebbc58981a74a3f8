"""Verified checkpoints without pickle: safetensors files and a manifest with their hashes, for any world size.

`tensor_io.save_checkpoint` and `sharded.save_sharded_checkpoint` write a checkpoint atomically, `manifest.latest_valid`
and `open_checkpoint` choose and verify one, and `tensor_io.load_checkpoint` opens its tensors, which are read lazily.
The package knows no parallel strategy: state is passed as tensors by name.
"""
