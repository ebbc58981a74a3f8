"""Shapes and dtypes of a model's buffers, where they differ between ranks or from those of the recipe's new model.

A buffer may grow, be set for the first time, or be registered during training: a cache, or statistics of data to come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.model_layout import dtype_and_shape
from launcher.strategies.buffers import is_overlapping, iter_buffers, write_values

__all__ = ["adopt_buffers", "describe_buffers", "find_changed_buffers", "synchronize_buffers"]


class BufferLayout(NamedTuple):
    """A buffer's full name and, if it is set, its shape and dtype."""

    name: str
    persistent: bool
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None


def describe_buffers(model: nn.Module) -> dict[str, str]:
    """Dtype and shape, as in a checkpoint's manifest, of each buffer that the model's `state_dict()` has."""
    return {
        f"{path}.{name}" if path else name: dtype_and_shape(tensor.dtype, tensor.shape)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def find_changed_buffers(model: nn.Module, initial: Mapping[str, str]) -> dict[str, str | None]:
    """The buffers that differ from `initial`, with dtype and shape there: None if new; the model may lack one."""
    now = describe_buffers(model)
    return {name: initial.get(name) for name in {**initial, **now} if initial.get(name) != now.get(name)}


@torch.no_grad()
def adopt_buffers(
    model: nn.Module, changed: Mapping[str, str | None], tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Give a new model the buffers of a saved one that had `changed` in training, with their values in `tensors`.

    Its other buffers can be written to afterwards: one whose elements share memory is replaced.
    """
    for module, own_name, tensor in list(iter_buffers(model)):
        if tensor is not None and is_overlapping(tensor):
            module._buffers[own_name] = tensor.clone()
    for name in changed:
        path, _, own_name = name.rpartition(".")
        module = model.get_submodule(path)
        if name in tensors:
            assign_buffer(module, own_name, tensors[name].to(device), persistent=True)
        elif own_name in module._buffers:
            module._buffers[own_name] = None


def assign_buffer(module: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
    """Assign a buffer, and register it if the module does not have it."""
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        module.register_buffer(name, tensor, persistent=persistent)


@torch.no_grad()
def synchronize_buffers(model: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's floating-point buffers. Collective.

    Where shapes differ between ranks, the persistent buffers follow rank 0. One that is not saved is a cache, whose
    size follows the data of its rank: each rank keeps its own.
    """
    layouts = list_layouts(model)
    if agree_on(layouts, device):
        for layout in layouts:
            if layout.shape is not None:
                receive_buffer(model, layout, device)
        return
    sent: list[Any] = [layouts if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0, device=device)
    for layout in sent[0]:
        if layout.shape is not None:
            receive_buffer(model, layout, device)
    drop_others(model, sent[0])


def list_layouts(model: nn.Module) -> list[BufferLayout]:
    """The floating-point buffers, and those that are not set."""
    return [
        BufferLayout(
            f"{path}.{name}" if path else name,
            name not in module._non_persistent_buffers_set,
            None if tensor is None else tuple(tensor.shape),
            None if tensor is None else tensor.dtype,
        )
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
        if tensor is None or tensor.is_floating_point()
    ]


def agree_on(layouts: list[BufferLayout], device: torch.device) -> bool:
    """Return whether all ranks have the same layouts. Collective."""
    digest = hashlib.blake2b(repr(layouts).encode(), digest_size=7).digest()
    number = int.from_bytes(digest, "little")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes.tolist()
    return bool(largest == -smallest)


def receive_buffer(model: nn.Module, layout: BufferLayout, device: torch.device) -> None:
    """Take rank 0's values of one of its buffers, unless it is a cache of another size here. Collective."""
    path, _, name = layout.name.rpartition(".")
    module, is_source = model.get_submodule(path), dist.get_rank() == 0
    own = module._buffers.get(name)
    matches = own is not None and tuple(own.shape) == layout.shape and own.dtype == layout.dtype
    if matches and own is not None:
        values = own.detach().to(device).contiguous()
    else:
        values = torch.empty(layout.shape or (), dtype=layout.dtype, device=device)
    dist.broadcast(values, src=0)
    if is_source:
        return
    if matches and own is not None:
        module._buffers[name] = write_values(own, values.to(own.device))
    elif layout.persistent:
        assign_buffer(module, name, values, persistent=True)


def drop_others(model: nn.Module, layouts: list[BufferLayout]) -> None:
    """Unset the persistent floating-point buffers that are not set on rank 0."""
    set_on_rank0 = {layout.name for layout in layouts if layout.shape is not None}
    for layout in list_layouts(model):
        if layout.persistent and layout.shape is not None and layout.name not in set_on_rank0:
            path, _, name = layout.name.rpartition(".")
            model.get_submodule(path)._buffers[name] = None
