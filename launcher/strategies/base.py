"""Behaviour common to all strategies: buffers, padding micro-batches, and skipping steps that are not finite."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.sharded import TensorSlice
from launcher.checkpoint.tensor_io import LazyTensors
from launcher.config.schema import RunConfig
from launcher.errors import TrainingFailed
from launcher.recipe import Loss
from launcher.strategies.buffer_layout import adopt_buffers, describe_buffers, find_changed_buffers, synchronize_buffers
from launcher.strategies.buffers import BufferSnapshot, preserve_buffers
from launcher.strategies.call_order import CallOrder
from launcher.strategies.extra_state import collect_extra_state, load_extra_state, split_extra_state
from launcher.strategies.gradient_norms import (
    FIRST_UPDATES,
    FIRST_UPDATES_WITH_HOOKS,
    MEASURE_EVERY,
    GradNormHooks,
    GroupGradNorms,
)
from launcher.strategies.interface import ReplicaState, ShardedState, StepResult
from launcher.strategies.later_parameters import LaterParameters
from launcher.strategies.loss_module import LossFn, LossModule, run_loss
from launcher.strategies.optimizer import drop_gradients, supports_found_inf, take_optimizer_step
from launcher.strategies.optimizer_state import OptimizerState
from launcher.strategies.precision import Precision
from launcher.strategies.stats_exchange import StatsAllReduce
from launcher.strategies.training_loss import (
    contribute_nothing,
    contribute_zeros,
    get_finite_value,
    reaches_parameter,
    read_training_loss,
)
from launcher.telemetry.stage_clock import StageClock
from launcher.telemetry.stats_fields import StatsRow

__all__ = ["BaseReplica", "make_wait_begin_hook", "make_wait_end_hook", "slice_evenly"]

#: Adam's average of squared gradients, and AMSGrad's maximum of it.
SECOND_MOMENT_SLOTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})


class BaseReplica:
    """A model whose buffers are local to each rank, and an optimizer that skips non-finite updates."""

    optimizer: torch.optim.Optimizer
    _parameters: Sequence[nn.Parameter]  # those that are trained
    _finds_unused = False  # parameters without a gradient in an update keep none
    same_parameter_tensors = True  # the strategy never replaces a parameter in the model
    decides_on_host = False
    keeps_new_buffers = True  # those that are registered in an update that is skipped, or in padding

    def __init__(self, model: nn.Module, world: int, precision: Precision) -> None:
        self.module = model
        self._loss_module = LossModule(model)
        self._wrapped: nn.Module = self._loss_module  # around which a strategy puts its wrapper
        self._precision = precision
        self._later_parameters = LaterParameters(model, same_tensors=self.same_parameter_tensors)
        self._is_padding = False
        self._is_last_micro_batch = False
        self._is_only_micro_batch: bool | None = None
        self._save_pending = True
        self._state_is_checked = False
        self._buffers_before = BufferSnapshot(model)  # the update
        self._initial_buffers = describe_buffers(model)
        self._group_norms = GroupGradNorms(precision.device)
        self._call_order: CallOrder | None = None  # set if collectives follow the order of calls
        self._set_world(world)
        self._norm_hooks: GradNormHooks | None = None  # set if micro-batches are the groups for the noise scale

    def micro_batch(self, *, last: bool, is_padding: bool, shard: int) -> AbstractContextManager[None]:
        self._is_padding, self._is_last_micro_batch = is_padding, last
        if self._call_order is not None:
            self._call_order.begin_micro_batch()
        if self._save_pending:
            self._save_pending = False
            self._buffers_before.take()
        self._is_only_micro_batch = last and self._is_only_micro_batch is not False
        return self._pad_micro_batch() if is_padding else MicroBatchEnd(self._end_micro_batch)

    @contextmanager
    def _pad_micro_batch(self) -> Iterator[None]:
        with self._preserve_running_stats():
            yield
        self._end_micro_batch()

    def _end_micro_batch(self) -> None:
        """After the forward and backward pass of a micro-batch."""
        if self._norm_hooks is not None and self._norm_hooks.enabled:
            self._norm_hooks.enabled = False
            self._group_norms.close(self._norm_hooks.pop_norms())

    @contextmanager
    def _preserve_running_stats(self) -> Iterator[None]:
        """Keep running statistics unchanged during a padding micro-batch.

        BatchNorm is in evaluation mode meanwhile, so that it accepts a single sample.
        """
        norms = (m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        training = [norm for norm in norms if norm.training]
        for norm in training:
            norm.training = False
        try:
            with preserve_buffers(self.module, keep_new=self.keeps_new_buffers):
                yield
        finally:
            for norm in training:
                norm.training = True

    def compute_loss(self, loss_fn: LossFn, batch: Any) -> Loss:
        if not torch.is_grad_enabled():
            return run_loss(self._loss_module, loss_fn, batch)
        return run_loss(self._wrapped, partial(self._compute_training_loss, loss_fn), batch)

    def _compute_training_loss(self, loss_fn: LossFn, model: nn.Module, batch: Any) -> Loss:
        parameter = self._parameters[0]  # one is enough to see whether loss() leaves earlier gradients alone
        before = parameter.grad
        version = None if before is None else before._version
        loss = read_training_loss(loss_fn(model, batch))
        if parameter.grad is not before or (before is not None and before._version != version):
            # The update would depend on how it is split into micro-batches.
            raise TrainingFailed(
                "recipe.loss changes the gradients of the model (by backward, zero_grad or clipping), which belong to "
                "earlier micro-batches: leave them alone and return the loss; train.clip_norm clips the gradient"
            )
        if self._is_last_micro_batch:
            self._later_parameters.find(self.module)
        if loss.count and not self._is_padding:
            return loss
        total = loss.total.to(self._precision.device)
        usable = reaches_parameter(total) and (self._is_padding or bool(torch.isfinite(total)))
        return replace(loss, total=self._join_reduction(total, usable))

    def _join_reduction(self, total: torch.Tensor, usable: bool) -> torch.Tensor:
        """The total of a micro-batch that counts nothing, such that its backward pass takes part in the reduction.

        `usable`: it is finite, or that of padding, and has a gradient of its own, which it keeps. Padding keeps none
        where that would give zeros to parameters that no sample uses, which the optimizer would then change.
        """
        if self._world == 1:
            return total if usable else get_finite_value(total)
        contribute = contribute_nothing if self._finds_unused else contribute_zeros
        own = total if usable and not (self._is_padding and self._finds_unused) else get_finite_value(total)
        return own + contribute(torch.zeros_like(own), self._parameters)

    def send_stats(self, row: StatsRow) -> None:
        self._stats.send(row)

    def receive_stats(self) -> torch.Tensor:
        return self._stats.receive()

    def exchange_stats(self, row: StatsRow) -> torch.Tensor:
        self._stats.send(row)
        return self._stats.receive()

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        self._measure_next_backward(0.0 if self._is_padding else count)
        if not total.requires_grad:
            return
        if self._precision.scaler is None:
            # From the derivative of total / samples, to the last bit: there is no division to compute forth and back.
            self._run_backward(total, torch.full_like(total, 1.0 / samples))
        else:
            # In float16, the loss scale itself, which is the first gradient, would be infinite.
            total = total.float() if total.dtype is torch.float16 else total
            self._run_backward(self._precision.scale_loss(total / samples), None)

    def _run_backward(self, total: torch.Tensor, gradient: torch.Tensor | None) -> None:
        torch.autograd.backward(total, gradient)

    def _pop_group_norms(self, scale: torch.Tensor | float) -> tuple[torch.Tensor | float, int]:
        """This rank's sum of group gradient norms and the number of groups; the gradients were scaled by `scale`."""
        self._is_only_micro_batch = None
        return self._group_norms.pop(scale)

    def pop_later_parameters(self) -> list[str]:
        return self._later_parameters.pop()

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

    def _step_if_finite(self, finite: torch.Tensor | bool, counted: torch.Tensor | None = None) -> None:
        """Step if the gradient is finite and the loss `counted` anything; else leave parameters and moments unchanged.

        A gradient that is not finite also puts the buffers back. torch allocates momentum buffers before it checks
        `found_inf` and would later use their uninitialised contents, so the first applied step is decided on the host.
        """
        applied = finite if counted is None else counted & finite
        if self._decides_on_device(applied):
            self.optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
            take_optimizer_step(self.optimizer)
            self._buffers_before.restore_unless(torch.as_tensor(finite))
        elif bool(applied):
            take_optimizer_step(self.optimizer)
            self._check_new_state()
        elif not bool(finite):
            self._buffers_before.restore(keep_new=self.keeps_new_buffers)
        self._update_loss_scale(finite)
        drop_gradients(self.optimizer)
        self._save_pending = True

    def _decides_on_device(self, applied: torch.Tensor | bool) -> TypeGuard[torch.Tensor]:
        on_gpu = isinstance(applied, torch.Tensor) and applied.device.type == "cuda"
        return on_gpu and supports_found_inf(self.optimizer) and bool(self.optimizer.state)

    def discard_update(self) -> StepResult:
        """Drop the gradients of an update whose loss counts nothing; buffers stay as the forward passes left them."""
        drop_gradients(self.optimizer)
        self._save_pending = True
        norm_sum, groups = self._pop_group_norms(1.0)
        norm = torch.full((), math.nan, device=self._precision.device)
        return StepResult(norm, torch.isnan(norm), norm_sum, groups)

    def _abandon_update(self) -> None:
        """Drop the gradients of an update that was interrupted, and what was counted in it; put the buffers back.

        If there is none, the buffers stay as the latest update left them.
        """
        for parameter in self.module.parameters():
            parameter.grad = None
        if not self._save_pending:
            self._buffers_before.restore(keep_new=False)  # the update will run again, and register them again
            self._save_pending = True
        self._is_padding = self._is_last_micro_batch = False
        self._is_only_micro_batch = None
        self._group_norms = GroupGradNorms(self._precision.device)

    def _set_world(self, world: int) -> None:
        self._world = world
        self._stats = StatsAllReduce(dist.get_rank() if world > 1 else 0, world, self._precision.device)

    def _set_optimizer(self, optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
        self.optimizer = optimizer
        schedules_momentum = config.schedule.momentum is not None
        self._optimizer_state = OptimizerState(optimizer, self.module, schedules_momentum=schedules_momentum)

    def _check_new_state(self) -> None:
        """After the first step, which creates it: check that all state of the optimizer can be saved."""
        if not self._state_is_checked:
            self._state_is_checked = True
            self._check_optimizer_state()

    def _check_optimizer_state(self) -> None:
        self._optimizer_state.collect()

    def _make_facts(self, optimizer: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON values of a checkpoint; `extra` are the extra states of the model's modules."""
        facts = {
            "optimizer": optimizer,
            "scaler": self._precision.state_dict(),
            "buffers": self._list_changed_buffers(),
        }
        return {**facts, "extra": extra} if extra else facts

    def _load_facts(self, facts: Mapping[str, Any], tensors: LazyTensors) -> None:
        """Load what `_make_facts` collects, except for the optimizer's."""
        load_extra_state(self.module, facts.get("extra", {}), tensors, self._precision.device)
        self._precision.load_state_dict(facts["scaler"])

    def full_state(self) -> ReplicaState:
        """The state of a model and an optimizer that every rank holds in full."""
        model, extra = split_extra_state(self.module.state_dict())
        return ReplicaState(model, *self._collect_others(extra))

    def _collect_others(self, extra: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors of the optimizer and of the modules' `extra` states, and everything that is not a tensor."""
        tensors, facts = self._optimizer_state.collect()
        extra_tensors, trees = collect_extra_state(extra)
        return tensors | extra_tensors, self._make_facts(facts, trees)

    def sharded_state(self) -> ShardedState:
        """An equal slice of the state on each rank."""
        model, optimizer, facts = self.full_state()
        slices: dict[str, TensorSlice] = {}
        return ShardedState(ReplicaState(slice_evenly(model, slices), slice_evenly(optimizer, slices), facts), slices)

    def pop_call_order(self) -> float:
        return 0.0 if self._call_order is None else self._call_order.pop()

    @torch.no_grad()
    def rescale_moments(self, factor: float) -> None:
        for state in self._get_optimizer_states():
            for slot in SECOND_MOMENT_SLOTS & state.keys() if isinstance(state, dict) else ():
                state[slot].mul_(factor)

    def _get_optimizer_states(self) -> Iterable[dict[str, Any]]:
        return self.optimizer.state.values()

    def _update_loss_scale(self, finite: torch.Tensor | bool) -> None:
        """Update the loss scale after the step."""
        self._precision.update()

    @torch.no_grad()
    def broadcast_buffers(self) -> None:
        if self._world > 1:
            synchronize_buffers(self.module, self._precision.device)

    def _list_changed_buffers(self) -> dict[str, str | None]:
        """For the checkpoint: the buffers whose dtype or shape is not that of the recipe's new model."""
        return find_changed_buffers(self.module, self._initial_buffers)

    def _adopt_buffers(self, model: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Before a checkpoint is loaded: take its buffers whose dtype or shape changed in training."""
        adopt_buffers(self.module, facts.get("buffers", {}), model, self._precision.device)


class MicroBatchEnd:
    """A context that calls `end` after a block that raises nothing, in a fraction of the time of a generator's."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end()


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
