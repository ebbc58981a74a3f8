"""Gives the state of one rank to ranks that are behind or new, over the process group, and checks that all have it.

Only tensors and JSON travel. A JSON header says which tensors follow; they are packed into a few large buffers, each of
one dtype, and broadcast as bytes: every bit arrives as it was. What the receivers load is what a checkpoint would hold,
and they load it as they would a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoint.tensor_io import LazyTensors, TensorIndex, index_tensors, view_as_bytes
from launcher.checkpoint.value_tree import find_tensor_keys
from launcher.errors import TrainingFailed
from launcher.strategies.interface import Replica, ReplicaState

__all__ = ["transfer_state"]

BUFFER_BYTES = 64 << 20  # a larger tensor has a buffer of its own
MESSAGE_BYTES = 256 << 20
DIGEST_BYTES = 16


@dataclass
class PackedBuffer:
    """Tensors of one dtype, one after the other. `on_cpu`: where they were, and are to be."""

    dtype: str
    on_cpu: bool
    numel: int = 0
    tensors: list[torch.Tensor] = field(default_factory=list)

    def has_room(self, tensor: torch.Tensor) -> bool:
        return not self.numel or (self.numel + tensor.numel()) * tensor.element_size() <= BUFFER_BYTES

    def add(self, tensor: torch.Tensor) -> int:
        """Add a tensor; return where it begins, in elements."""
        self.tensors.append(tensor)
        self.numel += tensor.numel()
        return self.numel - tensor.numel()

    def join(self, device: torch.device) -> torch.Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors]).to(device)


def transfer_state(replica: Replica, training: Mapping[str, Any], *, source: int, is_behind: bool) -> dict[str, Any]:
    """Give the state of rank `source` to the ranks that are behind; return the source's `training` facts. Collective.

    `training` are the JSON values of the training state: position, schedule and so on. Every rank holds the whole
    state; rank `source` is not behind. A rank that is not behind loads nothing, and must have the same parameters and
    the same state of the optimizer. Its buffers, as running statistics, may be its own. As in a checkpoint,
    buffers that are not saved are not part of the state.

    Raises:
        TrainingFailed: on every rank, if one of them then holds another state than the source.
    """
    state, device = replica.full_state(), next(replica.module.parameters()).device
    packed: list[PackedBuffer] = []
    header: dict[str, Any] = {}
    if dist.get_rank() == source:
        index = pack_tensors(state, packed)
        layout = [(buffer.dtype, buffer.on_cpu, buffer.numel) for buffer in packed]
        header = {"index": index, "layout": layout, "facts": state.facts, "training": training}
    header = broadcast_json(header, source, device)
    buffers = broadcast_packed(header["layout"], packed, source, device)
    if is_behind:
        received = list(buffers)
        model, optimizer = (LazyTensors(ReceivedTensors(received), group) for group in header["index"])
        replica.restore(model, optimizer, header["facts"])
        del received, model, optimizer
    else:
        for _ in buffers:  # each is dropped before the next one arrives
            pass
    check_equal_to_source(replica, source, is_behind, device)
    return dict(header["training"])


# --- the tensors ---------------------------------------------------------------------------------------------------


def pack_tensors(state: ReplicaState, packed: list[PackedBuffer]) -> list[TensorIndex]:
    """Assign the tensors of the model and of the optimizer to buffers; return the place of each, as in a manifest."""
    indexes: list[TensorIndex] = []
    latest: dict[tuple[torch.dtype, bool], int] = {}
    for group in (state.model, state.optimizer):
        unique, index = index_tensors(group, "")
        for name, tensor in unique.items():
            on_cpu = tensor.device.type == "cpu"
            number = latest.get((tensor.dtype, on_cpu))
            if number is None or not packed[number].has_room(tensor):
                number = latest[tensor.dtype, on_cpu] = len(packed)
                packed.append(PackedBuffer(index[name]["dtype"], on_cpu))
            index[name]["pieces"] = [[number, packed[number].add(tensor)]]
        indexes.append(index)
    return indexes


def broadcast_packed(
    layout: Iterable[tuple[str, bool, int]], packed: list[PackedBuffer], source: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Broadcast the buffers one by one, and yield each flat where its tensors were. Only the source has them packed."""
    for number, (dtype, on_cpu, numel) in enumerate(layout):
        flat = packed[number].join(device) if packed else torch.empty(numel, dtype=getattr(torch, dtype), device=device)
        for message in flat.view(torch.uint8).split(MESSAGE_BYTES) if numel else ():
            dist.broadcast(message, src=source)
        yield flat.cpu() if on_cpu else flat


class ReceivedTensors:
    """Reads tensors, or element ranges of them, from the buffers. Each is a copy, so that it keeps no buffer alive."""

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        self._buffers = buffers

    def __call__(self, facts: Mapping[str, Any], start: int = 0, stop: int | None = None) -> torch.Tensor:
        [[number, first]] = facts["pieces"]
        stop = math.prod(facts["shape"]) if stop is None else stop
        return self._buffers[number][first + start : first + stop].clone()


def broadcast_json(value: Any, source: int, device: torch.device) -> Any:
    """The source's value, on every rank as JSON gives it back."""
    text = json.dumps(value).encode() if dist.get_rank() == source else b""
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, src=source)
    received = torch.empty(int(length), dtype=torch.uint8, device=device)
    if text:
        received.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(received, src=source)
    return json.loads(bytes(view_as_bytes(received)))


# --- the check -----------------------------------------------------------------------------------------------------


def check_equal_to_source(replica: Replica, source: int, is_behind: bool, device: torch.device) -> None:
    """Compare what each rank holds now with what the source holds. Collective.

    Raises:
        TrainingFailed: on every rank, if one of them differs.
    """
    own_part, common = compute_digests(replica)
    own = torch.frombuffer(bytearray(bytes([is_behind]) + own_part + common), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    rows = [bytes(view_as_bytes(row)) for row in gathered]
    for rank, row in enumerate(rows):
        received = bool(row[0])
        begin = 1 if received else 1 + DIGEST_BYTES
        if row[begin:] != rows[source][begin:]:
            raise TrainingFailed(make_message(rank, source, received=received))


def make_message(rank: int, source: int, *, received: bool) -> str:
    if received:
        what = f"the state that rank {rank} received from rank {source} differs from what rank {source} holds"
    else:
        what = (
            f"rank {rank} has other parameters, or another state of the optimizer, than rank {source}, "
            "although both have finished the same updates"
        )
    return f"{what}: training cannot continue from it; start the run again, which resumes from the newest checkpoint"


def compute_digests(replica: Replica) -> tuple[bytes, bytes]:
    """Digests of the state that may be each rank's own, and of the part that is equal on all ranks after an update."""
    model, optimizer, facts = replica.full_state()
    parameters = {name for name, _ in replica.module.named_parameters(remove_duplicate=False)}
    local = find_tensor_keys(facts.get("extra", {}))  # of modules, which may have their own on each rank
    common = [("model", {name: model[name] for name in model if name in parameters})]
    common += [("optimizer", {key: optimizer[key] for key in optimizer if key not in local})]
    rest = [("model", {name: model[name] for name in model if name not in parameters})]
    rest += [("optimizer", {key: optimizer[key] for key in optimizer if key in local})]
    return compute_digest(rest, facts), compute_digest(common, facts["optimizer"])


def compute_digest(groups: Iterable[tuple[str, Mapping[str, torch.Tensor]]], facts: Mapping[str, Any]) -> bytes:
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    for group, tensors in groups:
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"\n{group} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(view_as_bytes(tensor))
    return digest.digest()
