"""The buffers of a model, looked up when they are used: a forward pass may assign them instead of changing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_
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
    """A buffer at one moment: the tensor that it was, and a copy of its values; both None for a buffer set to None.

    `version` is torch's count of changes in place.
    """

    module: nn.Module
    name: str
    persistent: bool
    tensor: torch.Tensor | None
    copy: torch.Tensor | None
    version: int
    is_writable: bool

    def assign(self, values: torch.Tensor | None) -> None:
        """Give the buffer these values, in the tensor that it was if possible; register it again if it was deleted."""
        if self.name not in self.module._buffers and not self.persistent:
            self.module._non_persistent_buffers_set.add(self.name)
        tensor = self.tensor
        self.module._buffers[self.name] = values if values is None or tensor is None else write_values(tensor, values)


#: A registered buffer with its module and name; None where it is not set.
BufferEntry = tuple[nn.Module, str, torch.Tensor | None]
GET_CHILDREN, GET_BUFFERS = attrgetter("_modules"), attrgetter("_buffers")


def list_modules(model: nn.Module) -> list[nn.Module]:
    """Every module once, in a fixed order; faster than `model.modules()`."""
    modules, seen = [model], {id(model)}
    for module in modules:  # the list grows while it is read
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return modules


def iter_buffers(model: nn.Module) -> Iterator[BufferEntry]:
    """Every registered buffer with its module and name; None where it is not set."""
    yield from BufferLookup(model).list_entries()


class BufferLookup:
    """Looks up the buffers that a model has now. Each update does so, so no Python code runs for each module.

    The modules are listed again only if one was added, removed or replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list_modules(model)
        self._children = self._list_children()

    def list_entries(self) -> list[BufferEntry]:
        children = self._list_children()
        if len(children) != len(self._children) or not all(map(is_, children, self._children)):
            self._modules = list_modules(self._modules[0])
            self._children = self._list_children()
        filled = filter(GET_BUFFERS, self._modules)
        return [(module, name, tensor) for module in filled for name, tensor in module._buffers.items()]

    def _list_children(self) -> list[nn.Module | None]:
        parents = filter(None, map(GET_CHILDREN, self._modules))
        return list(chain.from_iterable(map(dict.values, parents)))


def get_buffer(module: nn.Module, name: str) -> torch.Tensor | None:
    """The buffer as it is now; None if it is not set or no longer registered."""
    return module._buffers.get(name)


class BufferSnapshot:
    """The buffers of a model at the latest `take`, which reuses the memory of earlier copies."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers: list[BufferCopy] = []  # the same list until a buffer is added, removed or replaced
        self._lookup = BufferLookup(model)

    def take(self) -> None:
        current = self._lookup.list_entries()
        if not current and not self.buffers:
            return
        if not self._are_same_tensors(current):
            earlier = [*self.buffers, *[None] * len(current)][: len(current)]
            self.buffers = [make_copy(*buffer, before) for buffer, before in zip(current, earlier, strict=True)]
        if copies := [buffer.copy for buffer in self.buffers if buffer.copy is not None]:
            with torch.no_grad():
                torch._foreach_copy_(copies, [buffer.tensor for buffer in self.buffers if buffer.tensor is not None])

    def _are_same_tensors(self, current: Sequence[BufferEntry]) -> bool:
        """Whether every buffer is still the tensor that it was. It compares little, since each update calls it."""
        return len(current) == len(self.buffers) and all(
            known is tensor and (known is None or known.shape == copy.shape)  # type: ignore[union-attr]
            for (_, _, _, known, copy, _, _), (_, _, tensor) in zip(self.buffers, current, strict=True)
        )

    @torch.no_grad()
    def restore(self, *, keep_new: bool = True) -> None:
        """Set every buffer to the tensor that it was, with the values that it had.

        A buffer that was registered since has no earlier value. It stays if it is finite and `keep_new`.
        """
        current = self._lookup.list_entries()
        if self._can_write_all(current):
            if tensors := [buffer.tensor for buffer in self.buffers if buffer.tensor is not None]:
                torch._foreach_copy_(tensors, [buffer.copy for buffer in self.buffers if buffer.copy is not None])
            return
        known = {(id(buffer.module), buffer.name) for buffer in self.buffers}
        for module, name, tensor in current:
            if (id(module), name) not in known and not (keep_new and is_finite(tensor)):
                del module._buffers[name]
        for buffer in self.buffers:
            buffer.assign(buffer.copy)

    @torch.no_grad()
    def restore_unless(self, condition: torch.Tensor) -> None:
        """Restore unless a device scalar is true; the host waits for it if a buffer is new or has changed its shape."""
        current = self._lookup.list_entries()
        if not self._are_same_tensors(current) and not self._have_same_layouts(current):
            if not bool(condition):
                self.restore()
            return
        for buffer, (module, name, tensor) in zip(self.buffers, current, strict=True):
            if tensor is None or buffer.copy is None:
                continue
            if tensor is buffer.tensor and buffer.is_writable:
                torch.where(condition, tensor, buffer.copy, out=tensor)
            else:
                # what was assigned is not written to: it may be the memory of something else, such as a parameter
                module._buffers[name] = torch.where(condition, tensor.detach(), buffer.copy)

    def have_same_layouts(self) -> bool:
        """Whether the model has the same buffers with the same shapes, dtypes and devices."""
        return self._have_same_layouts(self._lookup.list_entries())

    def _can_write_all(self, current: Sequence[BufferEntry]) -> bool:
        """Whether every buffer is still the tensor that it was, and can be written to."""
        return self._have_same_layouts(current) and all(
            buffer.tensor is tensor and (tensor is None or buffer.is_writable)
            for buffer, (_, _, tensor) in zip(self.buffers, current, strict=True)
        )

    def _have_same_layouts(self, current: Sequence[BufferEntry]) -> bool:
        return len(current) == len(self.buffers) and all(
            buffer.module is module and buffer.name == name and have_same_layout(buffer.copy, tensor)
            for buffer, (module, name, tensor) in zip(self.buffers, current, strict=True)
        )

    def drop_unchanged(self) -> None:
        """Forget the buffers that have not been assigned or changed since, as far as torch counts changes."""
        self.buffers = [
            buffer
            for buffer in self.buffers
            if get_buffer(buffer.module, buffer.name) is not buffer.tensor
            or (buffer.tensor is not None and buffer.tensor._version != buffer.version)
        ]


def make_copy(module: nn.Module, name: str, tensor: torch.Tensor | None, before: BufferCopy | None) -> BufferCopy:
    """The buffer with memory for its values, that of `before` if that is the same buffer."""
    if before is not None and not (before.module is module and before.name == name):
        before = None
    if tensor is None:
        copy = None
    elif before is not None and have_same_layout(before.copy, tensor):
        if before.tensor is tensor:
            return before
        copy = before.copy
    else:
        copy = torch.empty_like(tensor, requires_grad=False)
    version = 0 if tensor is None or tensor.is_inference() else tensor._version
    persistent = name not in module._non_persistent_buffers_set
    is_writable = tensor is not None and not is_overlapping(tensor)
    return BufferCopy(module, name, persistent, tensor, copy, version, is_writable)


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


def is_finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


def have_same_layout(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether shapes, dtypes and devices are equal, or both are not set."""
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
