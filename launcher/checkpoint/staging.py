"""Copies of the state, staged between two updates, that can be written while training continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from launcher.checkpoint.tensor_io import storage_key

__all__ = ["StagingBuffers"]


class StagingBuffers:
    """CPU buffers reused by every copy. For CUDA tensors they are pinned and filled asynchronously.

    The copies are queued on the stream before the next optimizer step, so the step cannot change what they read.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._filled: torch.cuda.Event | None = None

    @torch.no_grad()
    def stage(self, group: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy tensors under the same names; tied tensors stay tied. Other values are passed through for validation."""
        copies: dict[str, torch.Tensor] = {}
        seen: dict[tuple[Any, ...], torch.Tensor] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                copies[name] = tensor
                continue
            memory = storage_key(tensor)
            if tensor.numel() == 0 or memory not in seen:
                seen[memory] = self._copy_to_buffer((group, name), tensor)
            copies[name] = seen[memory]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._filled = torch.cuda.Event()
            self._filled.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies are complete; called by the reader of the copies, never by the training loop."""
        if self._filled is not None:
            self._filled.synchronize()

    def _copy_to_buffer(self, key: tuple[str, str], tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)
