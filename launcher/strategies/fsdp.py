"""FSDP2: the model sharded by rows over the ranks with torch's fully_shard, gathered block by block when needed."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map_only

from launcher.checkpoint.sharded import TensorSlice
from launcher.checkpoint.tensor_io import LazyTensors
from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.recipe import Loss
from launcher.strategies.base import BaseReplica, make_wait_begin_hook, make_wait_end_hook
from launcher.strategies.block_calls import BlockCalls
from launcher.strategies.call_order import CallOrder
from launcher.strategies.extra_state import split_extra_state
from launcher.strategies.fsdp_checks import (
    check_parameter_shapes,
    check_sharded_state,
    check_tied_parameters,
    check_uniform_dtypes,
    refuse_gathered,
)
from launcher.strategies.gradient_norms import GradNormHooks, read_norm
from launcher.strategies.interface import ReplicaArgs, ReplicaState, ShardedState, StepResult
from launcher.strategies.loss_module import LossFn, LossModule
from launcher.strategies.meta_init import materialize
from launcher.strategies.missing_gradients import GradientUse
from launcher.strategies.normalizer import multiply_gradients, split_normalizer
from launcher.strategies.optimizer import make_optimizer, set_lr_and_momentum
from launcher.strategies.precision import Precision

__all__ = ["FsdpReplica"]


class FsdpReplica(BaseReplica):
    """Parameters, gradients and optimizer state are DTensors sharded by rows; every rank holds all buffers in full.

    Gradients are summed, not averaged, as under DDP: the loss is divided only by the update's number of samples. The
    forward pass's wait for the gathering of blocks counts as `sync`; in the backward pass, gathering cannot be
    distinguished from computing.
    """

    sharded = True
    same_parameter_tensors = False

    def __init__(self, args: ReplicaArgs) -> None:
        model, config, precision = args.model, args.config, args.precision
        check_parameter_shapes(model)
        check_tied_parameters(model, args.blocks)
        check_uniform_dtypes(model, args.blocks)
        loss_module = LossModule(model)
        self._sharded = apply_fully_shard(loss_module, config, args.world, precision, args.blocks)
        super().__init__(model, args.world, precision)
        self._wrapped = self._loss_module = loss_module
        optimizer = make_optimizer(model, config, args.groups, fused=(torch.optim.Adam, torch.optim.AdamW))
        self._set_optimizer(optimizer, config)
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._parameters = list(self._trained.values())
        self._rank = dist.get_rank()
        self._norm_hooks = norm_hooks = GradNormHooks()
        self._gathered: dict[str, torch.Tensor] = {}  # the trained parameters as they are in forward and backward
        blocks = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._block_calls = BlockCalls(blocks)
        self._call_order = CallOrder(blocks, repeated=True)
        self._use: GradientUse | None = None
        if args.world > 1:
            # Every rank reduces all parameters of a block, zeros for those that its loss did not use: otherwise the
            # ranks would reduce tensors of different lengths.
            self._sharded.set_reduce_scatter_unused_params(True)
            may_vary = config.strategy.find_unused_parameters
            self._use = GradientUse(self._trained, precision.device, may_vary=may_vary)
        for name, module in self._loss_module.named_modules():
            if module is loss_module or module in args.blocks:
                module.register_forward_pre_hook(make_wait_begin_hook(args.clock), prepend=True)
                module.register_forward_pre_hook(make_wait_end_hook(args.clock))
                module.register_forward_pre_hook(self._make_gradient_hook(name, norm_hooks))

    def _make_gradient_hook(self, prefix: str, norm_hooks: GradNormHooks) -> Callable[..., None]:
        """A forward pre-hook that registers hooks on the gradients of a block's gathered parameters.

        They exist from the first forward pass on and stay the same tensors. `prefix`: of their names. Blocks that are
        gathered when the whole model is called are registered with it, and not again when they are called.
        """
        is_registered = False

        def hook(block: nn.Module, *_: object) -> None:
            nonlocal is_registered
            if is_registered or not torch.is_grad_enabled():
                return
            is_registered = True
            for full_name, parameter in block.named_parameters(prefix):
                name = full_name.removeprefix("model.")
                if parameter.requires_grad and not isinstance(parameter, DTensor) and name not in self._gathered:
                    self._gathered[name] = parameter
                    norm_hooks.register(parameter)
                    if self._use is not None:
                        self._use.register(name, parameter)

        return hook

    @contextmanager
    def micro_batch(self, *, last: bool, is_padding: bool, shard: int) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(last)
        self._sharded.set_is_last_backward(last)
        zero_gradients = zero_padding_gradients(self._loss_module) if is_padding else nullcontext()
        if self._use is not None:
            self._use.begin_micro_batch(counts=not is_padding)
        with zero_gradients, super().micro_batch(last=last, is_padding=is_padding, shard=shard):
            yield
        if last and self._use is not None:
            for name in self._use.end_update():
                self._trained[name].grad = None  # the optimizer leaves it alone, as with one worker

    def _compute_training_loss(self, loss_fn: LossFn, model: nn.Module, batch: Any) -> Loss:
        with self._block_calls.record():
            return super()._compute_training_loss(loss_fn, model, batch)

    def _join_reduction(self, total: torch.Tensor, usable: bool) -> torch.Tensor:
        if usable:
            return total
        if self._use is not None:
            self._use.ignore_micro_batch()
        return self._block_calls.contribute(total, self._loss_module)

    @torch.no_grad()
    def step(
        self, lr: float, momentum: float | None, loss_normalizer: float | torch.Tensor, clip_norm: float | None
    ) -> StepResult:
        rows = [p.grad.to_local() for p in self._parameters if isinstance(p.grad, DTensor)]
        refuse_gathered(self._gathered)
        scale = self._precision.scale()
        norm_sum, groups = self._pop_group_norms(scale)
        factor, counted = split_normalizer(loss_normalizer)
        multiply_gradients(rows, factor / scale)
        total_norm = self._compute_grad_norm(rows)
        if clip_norm is not None:
            multiply_gradients(rows, torch.clamp(clip_norm / (total_norm + 1e-6), max=1.0))
        set_lr_and_momentum(self.optimizer, lr, momentum)
        norm, finite = read_norm(total_norm)
        self._step_if_finite(finite, counted)
        norm = norm if counted is None else torch.where(counted, total_norm, torch.nan)
        return StepResult(norm=norm, finite=finite, group_sq_norm_sum=norm_sum, groups=groups)

    def _update_loss_scale(self, finite: torch.Tensor | bool) -> None:
        if self._precision.scaler is not None:
            self._precision.update_scale(finite=bool(finite))

    def _compute_grad_norm(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Norm of the full gradient, on the parameters' device; a NaN or infinity on one rank reaches all ranks."""
        square = get_total_norm(rows).to(self._precision.device) ** 2
        dist.all_reduce(square)
        return square.sqrt()

    def full_state(self) -> ReplicaState:
        # first: this reshards blocks left gathered by validation
        state, extra = split_extra_state(self.module.state_dict(keep_vars=True))
        names = {id(p): name for name, p in self.module.named_parameters()}
        model: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            first = names.get(id(tensor), name)
            model[name] = model[first] if first in model else self._gather_full_tensor(tensor)
        others, facts = self._collect_others(extra)
        return ReplicaState(model, {name: self._gather_full_tensor(tensor) for name, tensor in others.items()}, facts)

    def _check_optimizer_state(self) -> None:
        tensors, facts = self._optimizer_state.collect()
        check_sharded_state(self._optimizer_state.kind, tensors, dict(self.module.named_parameters()))
        own = {key: value.tolist() for key, value in tensors.items() if not isinstance(value, DTensor)}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, hashlib.sha256(repr((facts, own)).encode()).hexdigest())
        if len(set(everywhere)) > 1:
            raise UsageError(
                f"strategy=fsdp: optimizer={self._optimizer_state.kind} keeps values that differ between the workers, "
                "which a checkpoint cannot hold: type strategy=ddp"
            )

    def sharded_state(self) -> ShardedState:
        slices: dict[str, TensorSlice] = {}

        def take_local(group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            local: dict[str, torch.Tensor] = {}
            for name, tensor in group.items():
                if isinstance(tensor, DTensor):
                    slices[name] = TensorSlice(tuple(tensor.shape), get_local_flat_range(tensor, self._rank)[0])
                    local[name] = tensor.to_local().detach().reshape(-1)
                elif self._rank == 0:
                    local[name] = tensor.detach()
            return local

        model, extra = split_extra_state(self.module.state_dict(keep_vars=True))
        others, facts = self._collect_others(extra)
        return ShardedState(ReplicaState(take_local(model), take_local(others), facts), slices)

    def _gather_full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The full tensor in host memory on rank 0; an empty tensor on the other ranks."""
        full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        return full.cpu() if self._rank == 0 else full.new_empty(0)

    @torch.no_grad()
    def restore(self, model: LazyTensors, optimizer: LazyTensors, facts: Mapping[str, Any]) -> None:
        self._adopt_buffers(model, facts)
        tensors, _ = split_extra_state(self.module.state_dict(keep_vars=True))
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                rows = tensor.to_local()
                rows.copy_(model.read_range(name, *get_local_flat_range(tensor, self._rank)).view(rows.shape))
            else:
                tensor.copy_(model[name])
        self._optimizer_state.load(optimizer, facts["optimizer"], partial(self._read_shard, optimizer))
        self._load_facts(facts, optimizer)

    def _read_shard(self, optimizer: LazyTensors, key: str, parameter: DTensor) -> torch.Tensor:
        """This rank's rows of a tensor of the optimizer's state that has the shape of its parameter."""
        rows = parameter.to_local()
        values = (
            optimizer.read_range(key, *get_local_flat_range(parameter, self._rank)).view(rows.shape).to(rows.device)
        )
        return DTensor.from_local(
            values,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def apply_fully_shard(
    loss_module: LossModule, config: RunConfig, world: int, precision: Precision, blocks: Sequence[nn.Module]
) -> FSDPModule:
    """Shard the model in place, block by block, after broadcasting rank 0's values."""
    cuda = precision.device.type == "cuda"
    lower = torch.bfloat16 if config.strategy.param_dtype == "bf16" else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(precision.device.type, (world,)),
        # None reshards all but the outermost module, whose parameters backward needs first.
        "reshard_after_forward": None if config.strategy.reshard_after_forward else False,
        "mp_policy": MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32 if lower else None),
        "offload_policy": CPUOffloadPolicy() if config.strategy.offload and cuda else OffloadPolicy(),
    }
    for module in (*blocks, loss_module):
        materialize(module)
        broadcast_from_rank0(module, precision.device)
        fully_shard(module, **options)
    if lower is not None:  # `fully_shard` would do that for the outermost module, which is not called with the inputs
        loss_module.model.register_forward_pre_hook(partial(cast_inputs, lower), with_kwargs=True)
    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return cast(FSDPModule, loss_module)


def cast_inputs(
    dtype: torch.dtype, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook that casts floating-point inputs, as FSDP2 does for the modules that it shards."""

    def cast_tensor(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    cast_args, cast_kwargs = tree_map_only(torch.Tensor, cast_tensor, (args, kwargs))
    return cast_args, cast_kwargs


@torch.no_grad()
def broadcast_from_rank0(model: nn.Module, device: torch.device) -> None:
    """Broadcast rank 0's parameters and buffers one at a time: other ranks may have drawn different random values."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, DTensor):
            continue  # belongs to a block that is already sharded
        values = tensor.detach().to(device)
        dist.broadcast(values, src=0)
        tensor.copy_(values)


def get_local_flat_range(tensor: DTensor, rank: int) -> tuple[int, int]:
    """The range [start, stop) of this rank's rows in the flat tensor: dimension 0 is divided as by torch.chunk."""
    width = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(rank * rows, tensor.shape[0]) * width
    return start, start + tensor.to_local().numel()


@contextmanager
def zero_padding_gradients(model: nn.Module) -> Iterator[None]:
    """Replace the gradients computed within the block by zeros; a weight of 0 would not do, since 0 · NaN is NaN.

    The gathered parameters exist only from a block's forward pass on, so the hooks are registered there.
    """
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def register_hooks(block: nn.Module, *_: object) -> None:
        trained = (p for p in block.parameters() if p.requires_grad and not isinstance(p, DTensor))
        handles.extend(parameter.register_hook(torch.zeros_like) for parameter in trained)

    handles.extend(m.register_forward_pre_hook(register_hooks) for m in model.modules() if isinstance(m, FSDPModule))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
