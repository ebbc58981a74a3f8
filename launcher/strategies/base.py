"""Behaviour common to all strategies: buffers, padding micro-batches, and skipping steps that are not finite."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.sharded import TensorSlice
from launcher.recipe import Loss
from launcher.strategies.activation_checkpointing import preserve_buffers
from launcher.strategies.gradient_norms import (
    FIRST_UPDATES,
    FIRST_UPDATES_WITH_HOOKS,
    MEASURE_EVERY,
    GradNormHooks,
    GroupGradNorms,
)
from launcher.strategies.loss_module import LossFn, LossModule, run_loss
from launcher.strategies.optimizer import supports_found_inf
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import StageClock

__all__ = ["BaseReplica", "make_wait_begin_hook", "make_wait_end_hook", "slice_evenly"]

#: Adam's average of squared gradients, and AMSGrad's maximum of it.
SECOND_MOMENT_SLOTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})


class BaseReplica:
    """A model whose buffers are local to each rank, and an optimizer that skips non-finite updates."""

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, world: int, precision: Precision) -> None:
        self.module = model
        self._loss_module = LossModule(model)
        self._wrapped: nn.Module = self._loss_module  # around which a strategy puts its wrapper
        self._world = world
        self._precision = precision
        self._is_padding = False
        self._is_only_micro_batch: bool | None = None
        self._save_pending = True
        self._buffers = [b for b in model.buffers() if b is not None]
        self._saved_buffers = [torch.empty_like(buffer) for buffer in self._buffers]
        self._group_norms = GroupGradNorms(precision.device)
        self._norm_hooks: GradNormHooks | None = None  # set if micro-batches are the groups for the noise scale
        self._batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @contextmanager
    def micro_batch(self, *, last: bool, is_padding: bool, shard: int) -> Iterator[None]:
        self._is_padding = is_padding
        if self._save_pending:
            self._save_buffers()
        self._is_only_micro_batch = last and self._is_only_micro_batch is not False
        with self._preserve_running_stats() if is_padding else nullcontext():
            yield
        if self._norm_hooks is not None and self._norm_hooks.enabled:
            self._norm_hooks.enabled = False
            self._group_norms.close(self._norm_hooks.pop_norms())

    @contextmanager
    def _preserve_running_stats(self) -> Iterator[None]:
        """Keep running statistics unchanged during a padding micro-batch.

        BatchNorm is in evaluation mode meanwhile, so that it accepts a single sample.
        """
        training = [norm for norm in self._batch_norms if norm.training]
        for norm in training:
            norm.training = False
        try:
            with preserve_buffers(self._buffers):
                yield
        finally:
            for norm in training:
                norm.training = True

    def compute_loss(self, loss_fn: LossFn, batch: Any) -> Loss:
        return run_loss(self._wrapped if torch.is_grad_enabled() else self._loss_module, loss_fn, batch)

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        self._measure_next_backward(0.0 if self._is_padding else count)
        self._precision.scale_loss(total / samples).backward()

    @torch.no_grad()
    def _save_buffers(self) -> None:
        """Save the buffers before an update, so that they can be restored if the update is skipped."""
        self._save_pending = False
        if self._buffers:
            torch._foreach_copy_(self._saved_buffers, self._buffers)

    def _pop_group_norms(self, scale: torch.Tensor | float) -> tuple[torch.Tensor, int]:
        """This rank's sum of group gradient norms and the number of groups; the gradients were scaled by `scale`."""
        self._is_only_micro_batch = None
        return self._group_norms.pop(scale)

    def measures_noise_at(self, update: int) -> bool:
        return (
            update < (FIRST_UPDATES if self._norm_hooks is None else FIRST_UPDATES_WITH_HOOKS)
            or update % MEASURE_EVERY == 0
        )

    def _measure_next_backward(self, count: float) -> None:
        """Measure the next backward pass, with loss count `count`; a lone micro-batch has no other to compare with."""
        self._group_norms.add_count(count)
        if self._norm_hooks is not None:
            self._norm_hooks.enabled = count > 0 and (self._world > 1 or not self._is_only_micro_batch)

    def _step_if_finite(self, finite: torch.Tensor) -> None:
        """Step if the gradient is finite; else leave parameters, moments, step counts and buffers unchanged.

        torch allocates momentum buffers before it checks `found_inf` and would later use their uninitialised contents,
        so the first applied step is decided on the host.
        """
        if finite.device.type == "cuda" and supports_found_inf(self.optimizer) and self.optimizer.state:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            for saved, buffer in zip(self._saved_buffers, self._buffers, strict=True):
                torch.where(finite, buffer, saved, out=buffer)
        elif bool(finite):
            self.optimizer.step()
        else:
            for saved, buffer in zip(self._saved_buffers, self._buffers, strict=True):
                buffer.copy_(saved)
        self._update_loss_scale(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._save_pending = True

    @torch.no_grad()
    def rescale_moments(self, factor: float) -> None:
        for state in self._get_optimizer_states():
            for slot in SECOND_MOMENT_SLOTS & state.keys():
                state[slot].mul_(factor)

    def _get_optimizer_states(self) -> Iterable[dict[str, Any]]:
        return self.optimizer.state.values()

    def _update_loss_scale(self, finite: torch.Tensor) -> None:
        """Update the loss scale after the step."""
        self._precision.update()

    @torch.no_grad()
    def broadcast_buffers(self) -> None:
        if self._world == 1:
            return
        for buffer in self._buffers:
            if buffer.is_floating_point():
                dist.broadcast(buffer, src=0)


def slice_evenly(group: Mapping[str, torch.Tensor], slices: dict[str, TensorSlice]) -> dict[str, torch.Tensor]:
    """Slice tensors that every rank holds in full into equal parts, one per rank; record their positions in `slices`.

    Tensors that are not floating-point (counters) are taken from rank 0, since they are not synchronised across ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    local: dict[str, torch.Tensor] = {}
    for name, tensor in group.items():
        if not tensor.is_floating_point():
            local.update({name: tensor} if rank == 0 else {})
            continue
        start, stop = (tensor.numel() * part // world for part in (rank, rank + 1))
        slices[name] = TensorSlice(tuple(tensor.shape), start)
        local[name] = tensor.detach().reshape(-1)[start:stop]
    return local


def make_wait_begin_hook(clock: StageClock) -> Callable[..., None]:
    """A hook for the start of a wait for other ranks: the time before it counts as the current pass's own work."""

    def hook(*_: object) -> None:
        if (stage := get_current_pass()) is not None:
            clock.lap(stage)

    return hook


def make_wait_end_hook(clock: StageClock) -> Callable[..., None]:
    """A hook for the end of a wait: the time since its start counts as `sync`."""

    def hook(*_: object) -> None:
        if get_current_pass() is not None:
            clock.lap("sync")

    return hook


def get_current_pass() -> str | None:
    """The current pass, forward or backward; None outside training. Activation recomputation counts as backward."""
    if torch._C._current_graph_task_id() >= 0:
        return "backward"
    return "forward" if torch.is_grad_enabled() else None
