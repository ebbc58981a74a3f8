"""The buffers of a model, looked up when they are used: a forward pass may assign them instead of changing them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

__all__ = [
    "BufferCopy",
    "BufferSnapshot",
    "get_buffer",
    "have_same_layout",
    "is_overlapping",
    "iter_buffers",
    "preserve_buffers",
    "replay_buffers",
    "write_values",
]


class BufferCopy(NamedTuple):
    """A buffer at one moment: the tensor that it was, and a copy of its values; both None for a buffer set to None."""

    module: nn.Module
    name: str
    persistent: bool
    tensor: torch.Tensor | None
    copy: torch.Tensor | None
    version: int

    def assign(self, values: torch.Tensor | None) -> None:
        """Give the buffer these values, in the tensor that it was if possible; register it again if it was deleted."""
        if self.name not in self.module._buffers and not self.persistent:
            self.module._non_persistent_buffers_set.add(self.name)
        can_write = values is not None and self.tensor is not None
        self.module._buffers[self.name] = write_values(self.tensor, values) if can_write else values


def iter_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor | None]]:
    """Every registered buffer with its module and name, in the order of `model.modules()`; None where it is not set."""
    pending, seen = [model], {model}
    while pending:
        module = pending.pop()
        for name, tensor in module._buffers.items():
            yield module, name, tensor
        for child in reversed(module._modules.values()):
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def get_buffer(module: nn.Module, name: str) -> torch.Tensor | None:
    """The buffer as it is now; None if it is not set or no longer registered."""
    return module._buffers.get(name)


class BufferSnapshot:
    """The buffers of a model at the latest `take`, which reuses the memory of earlier copies."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers: list[BufferCopy] = []
        self._model = model

    @torch.no_grad()
    def take(self) -> None:
        earlier = {(id(buffer.module), buffer.name): buffer.copy for buffer in self.buffers}
        self.buffers, copies, tensors = [], [], []
        for module, name, tensor in iter_buffers(self._model):
            copy = None
            if tensor is not None:
                copy = earlier.get((id(module), name))
                if copy is None or not have_same_layout(copy, tensor):
                    copy = torch.empty_like(tensor, requires_grad=False)
                copies.append(copy)
                tensors.append(tensor.detach())
            persistent = name not in module._non_persistent_buffers_set
            version = 0 if tensor is None or tensor.is_inference() else tensor._version
            self.buffers.append(BufferCopy(module, name, persistent, tensor, copy, version))
        if tensors:
            torch._foreach_copy_(copies, tensors)

    @torch.no_grad()
    def restore(self, *, keep_new: bool = True) -> None:
        """Set every buffer to the tensor that it was, with the values that it had.

        A buffer that was registered since has no earlier value. It stays if it is finite and `keep_new`.
        """
        for module, name in self._list_new():
            tensor = get_buffer(module, name)
            if not keep_new or (tensor is not None and not bool(torch.isfinite(tensor).all())):
                del module._buffers[name]
        for buffer in self.buffers:
            buffer.assign(buffer.copy)

    @torch.no_grad()
    def restore_unless(self, condition: torch.Tensor) -> None:
        """Restore unless a device scalar is true; the host waits for it if a buffer is new or has changed its shape."""
        current = [get_buffer(buffer.module, buffer.name) for buffer in self.buffers]
        pairs = list(zip(self.buffers, current, strict=True))
        if any(not have_same_layout(buffer.copy, tensor) for buffer, tensor in pairs) or self._list_new():
            if not bool(condition):
                self.restore()
            return
        for buffer, tensor in pairs:
            if tensor is not None and buffer.copy is not None:
                values = torch.where(condition, tensor.detach(), buffer.copy)
                # what was assigned is not written to: it may be the memory of something else, such as a parameter
                buffer.module._buffers[buffer.name] = (
                    write_values(tensor, values) if tensor is buffer.tensor else values
                )

    def drop_unchanged(self) -> None:
        """Forget the buffers that have not been assigned or changed since, as far as torch counts changes."""
        self.buffers = [
            buffer
            for buffer in self.buffers
            if get_buffer(buffer.module, buffer.name) is not buffer.tensor
            or (buffer.tensor is not None and buffer.tensor._version != buffer.version)
        ]

    def _list_new(self) -> list[tuple[nn.Module, str]]:
        known = {(id(buffer.module), buffer.name) for buffer in self.buffers}
        return [(module, name) for module, name, _ in iter_buffers(self._model) if (id(module), name) not in known]


@contextmanager
def preserve_buffers(model: nn.Module, *, keep_new: bool = True) -> Iterator[None]:
    """Restore the buffers of `model` after the block, also those that were assigned anew within it."""
    snapshot = BufferSnapshot(model)
    snapshot.take()
    try:
        yield
    finally:
        snapshot.restore(keep_new=keep_new)


@contextmanager
def replay_buffers(model: nn.Module, start: BufferSnapshot) -> Iterator[None]:
    """Within the block, the buffers are copies with the values at `start`; afterwards, what they were before it.

    No tensor is written to, since a backward pass may need its present values.
    """
    values = {(id(buffer.module), buffer.name): buffer.copy for buffer in start.buffers}
    before = list(iter_buffers(model))
    for module, name, tensor in before:
        value = values.get((id(module), name), tensor)
        module._buffers[name] = None if value is None else value.detach().clone()
    try:
        yield
    finally:
        for module, name, tensor in before:
            module._buffers[name] = tensor


def have_same_layout(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def is_overlapping(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as after `expand`: such a tensor cannot be written to."""
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def write_values(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`tensor` with these values, written in place if that is possible; else a new tensor."""
    if is_overlapping(tensor) or not have_same_layout(tensor, values):
        return values.clone()
    tensor.detach().copy_(values)
    return tensor
