"""Verified checkpoints without pickle: safetensors files and a manifest that hashes them. Knows no strategy."""
