"""DeepSpeed, ZeRO stages 0 to 3. Loss division, accumulation boundary, learning rate and state are the launcher's."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from launcher.checkpoint.sharded import TensorSlice
from launcher.checkpoint.tensor_io import LazyTensors
from launcher.errors import TrainingFailed, UsageError
from launcher.strategies.base import BaseReplica, make_wait_begin_hook, make_wait_end_hook, slice_evenly
from launcher.strategies.call_order import CallOrder
from launcher.strategies.deepspeed_config import make_deepspeed_config
from launcher.strategies.deepspeed_state import ZeroState
from launcher.strategies.elementwise import check_elementwise
from launcher.strategies.extra_state import collect_extra_state, load_model_tensors, split_extra_state
from launcher.strategies.gradient_norms import GradNormHooks
from launcher.strategies.interface import ReplicaArgs, ReplicaState, ShardedState, StepResult
from launcher.strategies.missing_gradients import FIND_UNUSED, GradientUse, describe_parameters
from launcher.strategies.optimizer import make_optimizer, set_lr_and_momentum
from launcher.strategies.optimizer_state import check_optimizer_class
from launcher.strategies.training_loss import contribute_zeros, reaches_parameter
from launcher.telemetry.stage_clock import StageClock

__all__ = ["DeepSpeedReplica"]


class DeepSpeedReplica(BaseReplica):
    """DeepSpeed averages gradients over the ranks; the step multiplies by the world size, so that they are summed.

    Parameters are fp32 and the loss is computed under our autocast, as under DDP: `train.precision` has one meaning.
    From stage 1 on, ZeRO divides gradients by its own loss scale when it steps, before norm and clipping. We use that
    division to remove the fp16 loss scale, to turn the average into a sum, and to rescale a loss whose count is not
    samples.
    """

    decides_on_host = True

    def __init__(self, args: ReplicaArgs) -> None:
        model, config, precision = args.model, args.config, args.precision
        model.to(precision.device)
        super().__init__(model, args.world, precision)
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
        self._clock = args.clock
        self._rank = dist.get_rank()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._use = GradientUse(names, precision.device, fix=f"strategy=ddp {FIND_UNUSED}")
        if config.strategy.stage:
            check_elementwise(config, precision.device)
        self._set_optimizer(make_optimizer(model, config, args.groups), config)
        self._decayed = list_decayed(model, self.optimizer)
        if precision.name in ("bf16", "fp16"):
            forward = wrap_in_autocast(precision.autocast, self._loss_module.forward)
            self._loss_module.forward = forward  # type: ignore[method-assign]
        ds_config = make_deepspeed_config(config, sum(parameter.numel() for parameter in self._parameters))
        self._engine = make_engine(self._loss_module, self.optimizer, ds_config, precision.device, debug=config.debug)
        set_group_timeout(config.launch.timeout_s)
        self._wrapped = self._engine
        if config.strategy.stage >= 2:
            # Modules that are called several times reduce and gather once, or not at all if they are small.
            owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
            self._call_order = CallOrder(owners, repeated=False)
        self._norm_hooks = GradNormHooks(self._parameters)
        for name, parameter in zip(names, self._parameters, strict=True):
            self._use.register(name, parameter)
        self._reduce = self._engine.allreduce_gradients
        self._engine.allreduce_gradients = self._reduce_and_mark_wait
        self._zero = self._engine.optimizer
        self._stage = stage = config.strategy.stage
        self._discards_gradients = False  # of the micro-batch whose loss was computed last
        self.sharded = stage > 0
        if stage == 3:
            time_param_gathering(self._zero.parameter_offload, args.clock)
        self._state = ZeroState(self._zero, model, self._shapes, stage, args.world) if stage else None

    def _reduce_and_mark_wait(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's gradient reduction after a backward pass; marks the wait after the last one of an update.

        Raises:
            TrainingFailed: DeepSpeed would take zeros for the gradient of a parameter that has none, and change it.
        """
        is_last = self._engine.is_gradient_accumulation_boundary()
        if is_last or self._stage >= 2:  # from stage 2 on, every micro-batch's gradients are reduced
            unused = self._use.end_update()
            if decayed := [name for name in self._decayed if name in unused]:
                raise TrainingFailed(
                    f"strategy=deepspeed would decay {describe_parameters(decayed)}, which loss() does not use: "
                    "freeze in model() what is never trained, or type optimizer.weight_decay=0 or strategy=ddp "
                    f"{FIND_UNUSED}"
                )
        if is_last:
            self._clock.begin_wait()
        self._reduce(*args, **kwargs)

    @contextmanager
    def micro_batch(self, *, last: bool, is_padding: bool, shard: int) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        self._use.begin_micro_batch(counts=not is_padding)
        zero_gradients = zero_gradients_in_backward(self._parameters) if is_padding else nullcontext()
        with zero_gradients, super().micro_batch(last=last, is_padding=is_padding, shard=shard):
            yield

    def _join_reduction(self, total: torch.Tensor, usable: bool) -> torch.Tensor:
        self._discards_gradients = not usable
        if usable:
            return total
        self._use.ignore_micro_batch()
        if self._stage < 2:
            return contribute_zeros(total, self._parameters)
        if not reaches_parameter(total):
            raise TrainingFailed(
                f"strategy.stage={self._stage}: recipe.loss counted 0 and returned a total that does not depend on the "
                "model, but all ranks sum gradients in the order of their backward pass: return 0 * model(x).sum(), "
                "or type strategy.stage=1"
            )
        return contribute_zeros(total, [total])  # through the same graph as on other ranks

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        self._measure_next_backward(0.0 if self._is_padding else count)
        discard, self._discards_gradients = self._discards_gradients and not self._is_padding, False
        try:
            with zero_gradients_in_backward(self._parameters) if discard else nullcontext():
                self._engine.backward(self._precision.scale_loss(total / samples))
        except AssertionError as error:
            if "already been reduced" not in str(error):
                raise
            raise UsageError(
                f"strategy.stage={self._stage} sums a gradient as soon as a backward pass has it, and several passes "
                "of one loss use a block, as with reentrant checkpoints: checkpoint with use_reentrant=False"
            ) from error

    def discard_update(self) -> StepResult:
        if self._state is None:
            self._engine.zero_grad()
        else:
            self._step_sharded(math.nan, None)
        return super().discard_update()

    @torch.no_grad()
    def step(
        self, lr: float, momentum: float | None, loss_normalizer: float | torch.Tensor, clip_norm: float | None
    ) -> StepResult:
        set_lr_and_momentum(self.optimizer, lr, momentum)
        run_step = self._step_unsharded if self._state is None else self._step_sharded
        scale = self._precision.scale()
        norm_sum, groups = self._pop_group_norms(scale)
        norm, applied = run_step(float(loss_normalizer) * self._world / scale, clip_norm)
        if not applied:
            self._buffers_before.restore()
        else:
            self._check_new_state()
        self._precision.update_scale(finite=applied)
        self._save_pending = True
        device = self._precision.device
        norm = torch.as_tensor(norm, dtype=torch.float32, device=device)
        return StepResult(norm, torch.tensor(applied, device=device), norm_sum, groups)

    def _step_sharded(self, factor: float, clip_norm: float | None) -> tuple[Any, bool]:
        """Step under stages 1 to 3: DeepSpeed itself skips a non-finite norm, on all ranks alike."""
        self._zero.clip_grad = clip_norm or 0.0
        poisoned: list[torch.Tensor] = []
        if math.isfinite(factor):
            self._zero.override_loss_scale(1.0 / factor)
        else:
            poisoned = poison_gradients(self._zero)
        self._engine.step()
        for gradient in poisoned:  # stage 3 reuses them, and does not overwrite the elements that pad them
            gradient.zero_()
        self._zero.override_loss_scale(1.0)
        return self._engine.get_global_grad_norm(), self._engine.was_step_applied()

    def _step_unsharded(self, factor: float, clip_norm: float | None) -> tuple[Any, bool]:
        """Step under stage 0: DeepSpeed has averaged the gradients and would step even if they are not finite."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
        norm = get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            self._engine.zero_grad()
            return norm, False
        if clip_norm is not None:
            clip_grads_with_norm_(self._parameters, clip_norm, norm)
        self._engine.step()
        return norm, True

    def _get_optimizer_states(self) -> Iterable[dict[str, Any]]:
        """From stage 1 on, the state of this rank's flat partitions."""
        return (self.optimizer if self._state is None else self._zero.optimizer).state.values()

    def _check_optimizer_state(self) -> None:
        if self._state is None:
            super()._check_optimizer_state()
        else:
            self._state.check(self._optimizer_state)

    @torch.no_grad()
    def full_state(self) -> ReplicaState:
        if self._state is None:
            return super().full_state()
        slots = dict(self._state.iter_full_slots(self._precision.device))
        return ReplicaState(dict(self._iter_full_weights()), *self._split_slots(slots))

    def _get_tensors(self) -> dict[str, Any]:
        return split_extra_state(self.module.state_dict(keep_vars=True))[0]

    def _split_slots(self, slots: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Split into tensors, and the JSON values with the part of the state that is not a tensor."""
        assert self._state is not None
        self._state.check(self._optimizer_state)
        numbers = {key: value for key, value in slots.items() if not isinstance(value, torch.Tensor)}
        tensors = {key: value for key, value in slots.items() if key not in numbers}
        extra_tensors, trees = collect_extra_state(split_extra_state(self.module.state_dict())[1])
        own_extra = extra_tensors if self._rank == 0 else {}
        return tensors | own_extra, self._make_facts(self._optimizer_state.make_facts(numbers), trees)

    @torch.no_grad()
    def sharded_state(self) -> ShardedState:
        if self._state is None:
            return super().sharded_state()
        slices: dict[str, TensorSlice] = {}
        slots: dict[str, Any] = {}
        for key, value, tensor_slice in self._state.iter_local_slots():
            slots[key] = value
            if tensor_slice is not None:
                slices[key] = tensor_slice
        return ShardedState(ReplicaState(self._get_local_weights(slices), *self._split_slots(slots)), slices)

    def _get_local_weights(self, slices: dict[str, TensorSlice]) -> dict[str, torch.Tensor]:
        """This rank's partitions under stage 3, without padding; an equal slice of tensors that all ranks hold."""
        tensors = self._get_tensors()
        partitioned = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "ds_id")}
        replicated = {name: tensor for name, tensor in tensors.items() if name not in partitioned}
        local = slice_evenly(replicated, slices)
        for name, tensor in partitioned.items():
            start = min(self._rank * tensor.ds_tensor.ds_numel, tensor.ds_numel)
            slices[name] = TensorSlice(tuple(tensor.ds_shape), start)
            local[name] = tensor.ds_tensor.detach()[: tensor.ds_numel - start]
        return local

    def _iter_full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's tensors, tied ones shared under every name; under stage 3 gathered, for rank 0 only."""
        gathered: dict[int, torch.Tensor] = {}
        for name, tensor in self._get_tensors().items():
            if not hasattr(tensor, "ds_id"):
                yield name, tensor.detach()
                continue
            if id(tensor) not in gathered:
                with gather_parameter(tensor, None):
                    whole = tensor.detach()
                    gathered[id(tensor)] = whole.to("cpu", copy=True) if self._rank == 0 else whole.new_empty(0)
            yield name, gathered[id(tensor)]

    @torch.no_grad()
    def restore(self, model: LazyTensors, optimizer: LazyTensors, facts: Mapping[str, Any]) -> None:
        self._adopt_buffers(model, facts)
        if self._state is None:
            load_model_tensors(self.module, model)
            self._optimizer_state.load(optimizer, facts["optimizer"])
        else:
            check_optimizer_class(self.optimizer, facts["optimizer"])
            self._load_weights(model)
            self._state.load(optimizer, facts["optimizer"])
        self._load_facts(facts, optimizer)

    def _load_weights(self, model: LazyTensors) -> None:
        loaded: set[int] = set()
        for name, tensor in self._get_tensors().items():
            if id(tensor) in loaded:
                continue
            loaded.add(id(tensor))
            if not hasattr(tensor, "ds_id"):
                tensor.copy_(model[name])
                continue
            with gather_parameter(tensor, 0):
                if self._rank == 0:
                    tensor.copy_(model[name])
        self._zero.refresh_fp32_params()


def make_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device, *, debug: bool
) -> Any:
    """Create DeepSpeed's engine on the existing process group, without compiling any of its kernels.

    Its shared-memory communication kernels need a compiler and minutes at the first start, and only serve inference.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    compatible_ops["deepspeed_shm_comm"] = False
    if not debug:
        # DeepSpeed warns about our autocast, which `wrap_in_autocast` restores in its forward pass; torch warns about
        # deprecated names that DeepSpeed uses.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def set_group_timeout(timeout_s: float) -> None:
    """Set our timeout on DeepSpeed's own process group, which it creates with torch's default of 30 minutes."""
    from deepspeed.utils import groups

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), groups._get_data_parallel_group())


def time_param_gathering(parameter_offload: Any, clock: StageClock) -> None:
    """Count stage 3's gathering of a module's parameters before forward and backward as waiting, not computing."""

    def add_timing(gather: Callable[..., None]) -> Callable[..., None]:
        begin, end = make_wait_begin_hook(clock), make_wait_end_hook(clock)

        def timed_gather(*args: Any) -> None:
            begin()
            gather(*args)
            end()

        return timed_gather

    for name in ("pre_sub_module_forward_function", "pre_sub_module_backward_function"):
        setattr(parameter_offload, name, add_timing(getattr(parameter_offload, name)))


def wrap_in_autocast(autocast: Callable[[], Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run `forward` under autocast: in its engine's forward, DeepSpeed disables any autocast but its own."""

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return forward(*args, **kwargs)

    return autocast_forward


@contextmanager
def gather_parameter(parameter: torch.Tensor, changed_by: int | None) -> Iterator[None]:
    """Gather a stage 3 parameter on every rank; on exit, keep the changes made by rank `changed_by`, if given."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=changed_by):
        yield


@contextmanager
def zero_gradients_in_backward(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Zero the gradients of `parameters` before DeepSpeed sees them: the loss of a padding micro-batch may be NaN."""
    hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def poison_gradients(zero: Any) -> list[torch.Tensor]:
    """Set the gradients to NaN so that DeepSpeed skips the step: there is no other way to request that.

    Returns what was set.
    """
    norms = getattr(zero, "norm_for_param_grads", {})  # for offloaded gradients, DeepSpeed checks only the norms
    for key in norms:
        norms[key] = norms[key] * math.nan
    poisoned = [gradient for gradients in zero.averaged_gradients.values() for gradient in gradients or ()]
    for gradient in poisoned:
        gradient.mul_(math.nan)
    return poisoned


def list_decayed(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the parameters with weight decay."""
    decayed = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]
