"""Exact mode: the full model on every rank, gradients added in a fixed tree, bitwise equal at any world size."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.tensor_io import LazyTensors
from launcher.errors import UsageError
from launcher.plan.virtual_shards import TreeSum, num_training_ranks
from launcher.recipe import Loss
from launcher.strategies.buffers import BufferCopy, BufferSnapshot, get_buffer, have_same_layout, preserve_buffers
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.gradient_norms import compute_norms
from launcher.strategies.interface import ReplicaArgs, ReplicaState
from launcher.strategies.loss_module import LossFn
from launcher.strategies.optimizer import drop_gradients
from launcher.strategies.stats_exchange import StatsAllReduce

__all__ = ["ExactReplica"]

#: A buffer with its values before the update.
SavedBuffer = tuple[BufferCopy, torch.Tensor]


class ExactReplica(DdpReplica):
    """DDP's optimizer step, on gradients that are summed in a fixed order.

    Each shard of the batch gives one flat vector: its gradients, its floating-point buffers, flags for the buffers that
    changed and for the parameters that have a gradient, and a 1. The vectors are added as ((0+1)+(2+3))+…: first the
    shards of a rank, then the ranks' sums by point-to-point sends; rank 0 broadcasts the total. An empty shard gives
    zeros.

    Every shard starts from the buffers as they were before the update. A floating-point buffer that some shard changed
    becomes the mean over the shards that have samples (summed in the same tree, each with equal weight whatever its
    number of samples); an unchanged one stays. Other buffers (counters) are those of shard 0, which always has samples.
    A buffer that is not saved may get another shape (a cache): it is as before the update again in the next shard.
    The shards are the groups for the noise scale, so that is bitwise equal too.
    """

    by_micro_batch = False
    decides_on_host = True
    keeps_new_buffers = False  # they would differ between ranks

    def __init__(self, args: ReplicaArgs) -> None:
        make_deterministic()
        super().__init__(replace(args, world=1))  # no communication by DDP: each rank is a world of one
        self._all_shards = args.config.elastic.shards
        self._share_shards(args.world)
        self._listed: list[BufferCopy] = []  # the buffers that `_mean_buffers` and `_counters` are among
        self._mean_buffers: list[SavedBuffer] = []
        self._counters: list[SavedBuffer] = []
        self._gradient_numel = sum(parameter.numel() for parameter in self._parameters)
        if args.world > 1:
            for tensor in (*args.model.parameters(), *args.model.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def _share_shards(self, world: int) -> None:
        """Share the shards among the ranks of the default process group, from the next update on."""
        self._real_world = world
        self._rank = dist.get_rank() if world > 1 else 0
        self._stats = StatsAllReduce(self._rank, world, self._precision.device)
        self._training_ranks = num_training_ranks(world, self._all_shards)
        self._shards = self._all_shards // self._training_ranks if self._rank < self._training_ranks else 0
        self._shard0_counters: list[torch.Tensor] = []
        self._tree = TreeSum()
        self._shard: int | None = None

    def reform(self, world: int) -> None:
        super().reform(1)
        self._share_shards(world)

    def compute_loss(self, loss_fn: LossFn, batch: Any) -> Loss:
        """As under DDP; a validation batch changes no buffer, since each rank has other batches."""
        if torch.is_grad_enabled():
            return super().compute_loss(loss_fn, batch)
        with preserve_buffers(self.module, keep_new=False):
            return super().compute_loss(loss_fn, batch)

    @contextmanager
    def micro_batch(self, *, last: bool, is_padding: bool, shard: int) -> Iterator[None]:
        if self._shard not in (None, shard):
            self._finish_shard()
        self._shard = shard
        with super().micro_batch(last=last, is_padding=is_padding, shard=shard):
            yield
        if last:
            if not is_padding:
                self._finish_shard()
            self._shard = None
            self._sum_shards()

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        if not self._is_padding:
            super().backward(total, samples, count)

    @torch.no_grad()
    def _finish_shard(self) -> None:
        """Finish a shard: store its vector, then reset gradients and buffers for the next one."""
        packed = self._pack_shard()
        self._tree.add(packed)
        if self._group_norms.measuring:
            self._group_norms.close(compute_norms([packed[: self._gradient_numel]]))
        if self._shard == 0:
            self._shard0_counters = [self._get_value(counter).clone() for counter, _ in self._list_counters()]
        drop_gradients(self.optimizer)
        self._buffers_before.restore(keep_new=self.keeps_new_buffers)

    def _pack_shard(self) -> torch.Tensor:
        check_shapes_of_buffers(self.module, self._buffers_before)
        device, dtype = self._precision.device, self._get_sum_dtype()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        values = [(self._get_value(buffer), saved) for buffer, saved in self._list_mean_buffers()]
        changed = [(value != saved).any() for value, saved in values]
        flags = torch.tensor([*(p.grad is not None for p in self._parameters), True], device=device)
        parts = [*gradients, *(value for value, _ in values), *changed, flags]
        return torch.cat([part.reshape(-1).to(dtype) for part in parts])

    def _list_mean_buffers(self) -> list[SavedBuffer]:
        """The floating-point buffers of this update, with their values before it."""
        self._sort_buffers()
        return self._mean_buffers

    def _list_counters(self) -> list[SavedBuffer]:
        """The other buffers of this update, with their values before it."""
        self._sort_buffers()
        return self._counters

    def _sort_buffers(self) -> None:
        """Sort the buffers into these two kinds, once for each list of them that a snapshot makes."""
        if self._listed is self._buffers_before.buffers:
            return
        self._listed = self._buffers_before.buffers
        pairs = [(buffer, buffer.copy) for buffer in self._listed if buffer.copy is not None]
        self._mean_buffers = [(buffer, saved) for buffer, saved in pairs if saved.is_floating_point()]
        self._counters = [(buffer, saved) for buffer, saved in pairs if not saved.is_floating_point()]

    def _get_value(self, buffer: BufferCopy) -> torch.Tensor:
        """The buffer's value in this shard; of a cache that grew in it, the value before."""
        value = get_buffer(buffer.module, buffer.name)
        assert buffer.copy is not None
        return value.detach() if value is not None and have_same_layout(value, buffer.copy) else buffer.copy

    def _get_sum_dtype(self) -> torch.dtype:
        summed = [*self._parameters, *(saved for _, saved in self._list_mean_buffers())]
        return reduce(torch.promote_types, (tensor.dtype for tensor in summed), torch.float32)

    def _list_sizes(self) -> list[int]:
        """The numbers of elements of the parts of a shard's vector."""
        means = [saved.numel() for _, saved in self._list_mean_buffers()]
        return [*(p.numel() for p in self._parameters), *means, *[1] * len(means), len(self._parameters) + 1]

    @torch.no_grad()
    def _sum_shards(self) -> None:
        zeros = torch.zeros(sum(self._list_sizes()), dtype=self._get_sum_dtype(), device=self._precision.device)
        while self._tree.size < self._shards:
            # Adding zeros is not a no-op (-0.0 + 0.0 is 0.0), and must not depend on which rank has the other operand.
            self._tree.add(zeros)
        total = self._reduce_to_rank0(self._tree.total()) if self._shards else zeros
        self._tree = TreeSum()
        if self._real_world > 1:
            dist.broadcast(total, src=0)
        self._load_summed_gradients(total)
        self._broadcast_counters()

    def _reduce_to_rank0(self, total: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks in a binary tree; rank 0 ends with the total."""
        step = 1
        while step < self._training_ranks:
            if self._rank % (2 * step):
                dist.send(total, self._rank - step)
                break
            other = torch.empty_like(total)
            dist.recv(other, self._rank + step)
            total = total + other
            step *= 2
        return total

    def _load_summed_gradients(self, total: torch.Tensor) -> None:
        mean_buffers = self._list_mean_buffers()
        parts, parameters, means = total.split(self._list_sizes()), len(self._parameters), len(mean_buffers)
        *has_gradient, shards = parts[-1].tolist()
        for parameter, gradient, present in zip(self._parameters, parts, has_gradient, strict=False):
            # In the parameter's memory layout: the optimizer's fused kernel iterates over both together.
            parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape)) if present else None
        sums, changed = parts[parameters : parameters + means], parts[parameters + means : -1]
        for (buffer, saved), total_value, was_changed in zip(mean_buffers, sums, changed, strict=True):
            mean = (total_value / shards).view(saved.shape).to(saved.dtype)
            buffer.assign(torch.where(was_changed > 0, mean, saved))

    def _broadcast_counters(self) -> None:
        """Broadcast the counters of shard 0 to every rank, as bytes in one message."""
        counters = self._list_counters()
        if not counters:
            return
        values = self._shard0_counters or [saved for _, saved in counters]
        message = torch.cat([counter.reshape(-1).view(torch.uint8) for counter in values])
        if self._real_world > 1:
            dist.broadcast(message, src=0)
        sizes = [saved.numel() * saved.element_size() for _, saved in counters]
        for (counter, saved), part in zip(counters, message.split(sizes), strict=True):
            counter.assign(part.clone().view(saved.dtype).view(saved.shape))
        self._shard0_counters = []

    def full_state(self) -> ReplicaState:
        model, optimizer, facts = super().full_state()
        return ReplicaState(model, optimizer, {**facts, "exact": get_numeric_environment(self._precision.device)})

    def restore(self, model: LazyTensors, optimizer: LazyTensors, facts: Mapping[str, Any]) -> None:
        """Load a checkpoint.

        Raises:
            UsageError: the checkpoint is of an exact run in a different numeric environment.
        """
        current, saved = get_numeric_environment(self._precision.device), facts.get("exact", {})
        for name, was in saved.items():
            if current.get(name) != was:
                raise UsageError(
                    f"elastic.exact=true: {name} was {was} in the checkpoint and is {current.get(name)} now, which "
                    f"changes the last bits: continue with {was}, or start a new run with run.name=…"
                )
        super().restore(model, optimizer, facts)


def check_shapes_of_buffers(model: nn.Module, before: BufferSnapshot) -> None:
    """Check that a shard left the saved buffers their shapes: else their mean over the shards is not defined.

    Raises:
        UsageError: names the buffer.
    """
    if before.have_same_layouts():
        return
    shapes = {(id(buffer.module), buffer.name): buffer.copy for buffer in before.buffers}
    for path, module in model.named_modules():
        for name, tensor in module._buffers.items():
            if name in module._non_persistent_buffers_set:
                continue
            saved = shapes.get((id(module), name))
            if not have_same_layout(saved, tensor):
                was, now = ("not set" if each is None else str(list(each.shape)) for each in (saved, tensor))
                raise UsageError(
                    f"elastic.exact=true: the buffer {path}{'.' if path else ''}{name} changed its shape or dtype in "
                    f"an update ({was} before, {now} after), so that the shards have no mean of it: register it with "
                    "its final shape in model(), or with persistent=False if it can be computed again"
                )


def make_deterministic() -> None:
    """Make this process deterministic: the same kernels in the same order, and no TF32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def get_numeric_environment(device: torch.device) -> dict[str, Any]:
    """The environment that the last bits of a result depend on, besides the configuration."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "the number of threads": torch.get_num_threads(),
        "the kind of device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "the processor's instructions": torch.backends.cpu.get_cpu_capability(),
    }
