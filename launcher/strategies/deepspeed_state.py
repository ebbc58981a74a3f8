"""Convert optimizer state between DeepSpeed's flat partitions and full tensors by name, one tensor at a time.

Under ZeRO, a rank holds one contiguous range (possibly empty) of each parameter's elements, as a part of its group's
flat tensor; the optimizer sees only that tensor. The position of the ranges is all that differs between the stages, and
only `partition_slices` depends on it. It reads private attributes of DeepSpeed: the version is pinned, and tests
compare the result with plain torch bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.sharded import TensorSlice
from launcher.checkpoint.tensor_io import LazyTensors
from launcher.errors import UsageError
from launcher.strategies.optimizer_state import OptimizerState

__all__ = ["PartitionSlice", "ZeroState", "partition_slices"]

#: Slots of torch's optimizers with a single value per parameter. Others are recognised by their shape.
SCALAR_SLOTS = frozenset({"step", "eta", "mu", "mu_product"})


@dataclass(frozen=True)
class PartitionSlice:
    """Elements [start, start + numel) of a parameter, stored from `offset` on in this rank's `flat` tensor."""

    flat: torch.Tensor
    offset: int
    start: int
    numel: int

    def slice_flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """This slice of `flat`, or of an optimizer slot of the same length."""
        return tensor.narrow(0, self.offset, self.numel)

    def slice_full(self, whole: torch.Tensor) -> torch.Tensor:
        """This slice of the full parameter."""
        return whole.reshape(-1).narrow(0, self.start, self.numel)


def partition_slices(zero: Any, stage: int, rank: int) -> Iterator[tuple[nn.Parameter, PartitionSlice]]:
    """Every trainable parameter with this rank's slice of it, in the same order on every rank."""
    if stage == 3:
        for parameter in (parameter for group in zero.fp16_groups for parameter in group):
            index, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = min(rank * length, parameter.ds_numel)  # padded at the end so that all ranks have equal lengths
            numel = min(length, parameter.ds_numel - start)
            yield parameter, PartitionSlice(zero.fp32_partitioned_groups_flat[index], offset, start, numel)
        return
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                yield parameter, PartitionSlice(flat, 0, 0, 0)
            else:
                address = mapping.hp_fragment_address
                yield parameter, PartitionSlice(flat, address.start, mapping.lp_fragment_address.start, address.numel)


class ZeroState:
    """The state of a ZeRO optimizer (`zero`, stages 1 to 3) by the names of the model's parameters."""

    def __init__(self, zero: Any, model: nn.Module, shapes: Mapping[str, torch.Size], stage: int, world: int) -> None:
        self._zero = zero
        self._world = world
        self._rank = dist.get_rank()
        self._shapes = shapes
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._slices = {names[id(parameter)]: piece for parameter, piece in partition_slices(zero, stage, self._rank)}

    def _iter_values(self) -> Iterator[tuple[str, str, PartitionSlice, Any]]:
        """Parameter name, slot, slice, and the optimizer's value: a flat tensor, or a single value for the group."""
        for name, piece in self._slices.items():
            for slot, value in self._zero.optimizer.state.get(piece.flat, {}).items():
                if value is not None:
                    yield name, slot, piece, value

    def iter_local_slots(self) -> Iterator[tuple[str, Any, TensorSlice | None]]:
        """This rank's slice of each slot as `<parameter>/<slot>`, with its position.

        Slots with a single value have no position. Tensors among them come from rank 0 only.
        """
        for name, slot, piece, value in self._iter_values():
            if is_flat(slot, value, piece):
                yield f"{name}/{slot}", piece.slice_flat(value), TensorSlice(tuple(self._shapes[name]), piece.start)
            elif not isinstance(value, torch.Tensor):
                yield f"{name}/{slot}", value, None
            elif self._rank == 0:  # a copy: a checkpoint keeps track of tensors that are shared, and this is a group's
                yield f"{name}/{slot}", value.clone(), None

    def iter_full_slots(self, device: torch.device) -> Iterator[tuple[str, Any]]:
        """Each slot as `<parameter>/<slot>`: in full on rank 0, on the CPU; empty on the others. Collective.

        The elements are reduced as integers: a float sum of one value and zeros would turn -0.0 into 0.0.
        """
        for name, slot, piece, value in self._iter_values():
            if is_flat(slot, value, piece):
                yield f"{name}/{slot}", self._gather_full(name, piece, value, device)
            else:
                yield f"{name}/{slot}", value.clone() if isinstance(value, torch.Tensor) else value

    def _gather_full(
        self, name: str, piece: PartitionSlice, values: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        shape = self._shapes[name]
        whole = torch.zeros(shape.numel(), dtype=values.dtype, device=device)
        piece.slice_full(whole).copy_(piece.slice_flat(values))
        if self._world > 1:
            dist.reduce(whole.view(torch.uint8 if whole.element_size() % 4 else torch.int32), dst=0)
        return whole.view(shape).cpu() if self._rank == 0 else whole.new_empty(0)

    def check(self, optimizer_state: OptimizerState) -> None:
        """Check that the optimizer's state can be divided as its flat partitions are.

        Raises:
            UsageError: names the first other state.
        """
        kept = find_group_state(optimizer_state)
        flats = {id(piece.flat) for piece in self._slices.values()}
        for flat, slots in self._zero.optimizer.state.items():
            kept += [] if id(flat) in flats else [f"state[{flat!r}]" if isinstance(flat, str) else "other state"]
            if id(flat) in flats:
                kept += [f"{slot} in its state" for slot, value in slots.items() if not is_divisible(value, flat)]
        if kept:
            raise UsageError(
                f"strategy=deepspeed: optimizer={optimizer_state.kind} keeps {kept[0]}, and only tensors with an "
                "element for each one of the parameter, and numbers that are the same for all, can be divided at "
                "strategy.stage=1, 2 or 3: type strategy.stage=0 or strategy=ddp"
            )

    @torch.no_grad()
    def load(self, tensors: LazyTensors, facts: Mapping[str, Any]) -> None:
        """Replace the optimizer's state by a checkpoint's.

        Raises:
            UsageError: parameters of one group have different step counts, which a flat group cannot represent; or
                there is state that cannot be divided.
        """
        check_divisible(facts)
        numbers = facts["numbers"]
        slots_by_parameter = group_slots_by_parameter((*tensors, *numbers))
        self._zero.optimizer.state.clear()
        for name, piece in self._slices.items():
            state = self._zero.optimizer.state[piece.flat] if name in slots_by_parameter else {}
            for slot in slots_by_parameter.get(name, ()):
                key = f"{name}/{slot}"
                if key in numbers or is_scalar(slot, tensors.shape(key), self._shapes[name]):
                    self._set_group_value(state, name, slot, numbers[key] if key in numbers else tensors[key])
                else:
                    if slot not in state:
                        state[slot] = torch.zeros_like(piece.flat)
                    if piece.numel:
                        piece.slice_flat(state[slot]).copy_(
                            tensors.read_range(key, piece.start, piece.start + piece.numel)
                        )

    def _set_group_value(self, state: dict[str, Any], name: str, slot: str, value: Any) -> None:
        if slot in state and bool(state[slot] != value):
            raise UsageError(
                f"strategy=deepspeed keeps one {slot} for a group of parameters, and the checkpoint has "
                f"{float(value):g} for {name} and {float(state[slot]):g} for others: continue with strategy=ddp"
            )
        state[slot] = value


def group_slots_by_parameter(keys: Iterable[str]) -> dict[str, list[str]]:
    """Group the keys `<parameter>/<slot>` into the slots of each parameter."""
    slots: dict[str, list[str]] = {}
    for key in keys:
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, []).append(slot)
    return slots


def is_flat(slot: str, value: Any, piece: PartitionSlice) -> bool:
    """Whether a slot has a value for each element."""
    return isinstance(value, torch.Tensor) and value.shape == piece.flat.shape and slot not in SCALAR_SLOTS


def is_scalar(slot: str, shape: tuple[int, ...], parameter_shape: torch.Size) -> bool:
    """Whether a slot of this shape is one value for a parameter of `parameter_shape`."""
    return not shape and (slot in SCALAR_SLOTS or len(parameter_shape) > 0)


def is_divisible(value: Any, flat: torch.Tensor) -> bool:
    """Whether a slot can be divided: an element for each one of the parameter, or one number, or nothing."""
    if isinstance(value, torch.Tensor):
        return value.shape == flat.shape or not value.ndim
    return value is None or isinstance(value, bool | int | float | str)


def find_group_state(optimizer_state: OptimizerState) -> list[str]:
    """What an optimizer keeps for its groups or as a whole; DeepSpeed steps the parts of a group one by one."""
    entries = [key for group in optimizer_state.find_changed_entries() for key in group]
    return [
        *(f"{key} in its parameter groups" for key in entries),
        *(f"self.{key}" for key in optimizer_state.find_changed_attributes()),
    ]


def check_divisible(facts: Mapping[str, Any]) -> None:
    """Check that a checkpoint's optimizer state is one that partitions can hold.

    Raises:
        UsageError: it has state of groups, or nested state.
    """
    nested = [key for key, tree in facts.get("trees", {}).items() if tree != {"value": None}]
    whole = [part for part in ("entries", "state", "extra", "attributes") if facts.get(part)]
    if nested or whole:
        what = nested[0] if nested else "values for its groups or as a whole"
        raise UsageError(
            f"strategy=deepspeed: the checkpoint's optimizer {facts['kind']} keeps {what}, which cannot be divided at "
            "strategy.stage=1, 2 or 3: type strategy.stage=0 or strategy=ddp"
        )
