"""DDP: the full model on every rank, gradients summed by DistributedDataParallel."""

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from launcher.checkpoint.tensor_io import LazyTensors
from launcher.errors import TrainingFailed
from launcher.recipe import Loss
from launcher.strategies.base import BaseReplica
from launcher.strategies.extra_state import load_model_tensors
from launcher.strategies.gradient_norms import GradNormHooks, compute_norms, read_norm
from launcher.strategies.interface import ReplicaArgs, StepResult
from launcher.strategies.loss_module import LossFn
from launcher.strategies.missing_gradients import (
    FIND_UNUSED,
    find_unreduced,
    make_unreduced_error,
    translate_reducer_error,
)
from launcher.strategies.normalizer import multiply_gradients, split_normalizer
from launcher.strategies.optimizer import make_optimizer, set_lr_and_momentum
from launcher.strategies.stats_exchange import StatsInBucket
from launcher.telemetry.stats_fields import StatsRow

__all__ = ["DdpReplica"]

#: The argument was renamed in torch 2.13. Buffers are synchronised by `broadcast_buffers` of the replica instead.
BUFFER_SYNC_ARG = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class DdpReplica(BaseReplica):
    """DDP whose gradient is the sum over ranks of d(total)/samples, which is correct for any shares.

    So nothing is divided by the world size, and the communication hook sums. The hook also marks the clock at the last
    bucket, after which the backward pass only waits, and sends zeros from a rank that has only padding, whatever the
    gradient of the padding is. In the hook, each rank's own gradient is visible: the ranks are the groups for the noise
    scale; with a single worker, the micro-batches are.

    DDP reduces a bucket once all its parameters have a gradient. If one has none, the bucket stays local, and torch
    would say so in the next forward pass only, after the step: whether the last bucket was reduced is checked before.

    The ranks' statistics are the gradient of one more parameter, and need no message of their own.
    """

    sharded = False
    by_micro_batch = True

    def __init__(self, args: ReplicaArgs) -> None:
        model, config = args.model, args.config
        super().__init__(model.to(args.precision.device), args.world, args.precision)
        self._clock = args.clock
        self._settings = config.strategy
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._trained_names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self._set_up_reduction(args.world, init_sync=True)
        if self._static_graph:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)
        self._set_optimizer(make_optimizer(model, config, args.groups), config)

    def _set_up_reduction(self, world: int, *, init_sync: bool) -> None:
        """Prepare to sum gradients and statistics over the ranks of the default process group."""
        self._bucket_stats: StatsInBucket | None = None
        if world > 1:
            device, dtype = self._precision.device, self._precision.dtype
            self._bucket_stats = StatsInBucket(dist.get_rank(), world, device, dtype)
            self._loss_module.register_parameter("stats", self._bucket_stats.words)
        self._static_graph = world > 1 and self._settings.static_graph
        self._finds_unused = world > 1 and self._settings.find_unused_parameters and not self._static_graph
        self._left_out: dict[str, torch.Tensor] | None = None
        self._is_reduced = False
        self._bucket_norms: list[torch.Tensor] = []
        if world > 1 and not self._static_graph:
            self._wrapped = self._wrap_in_ddp(find_unused_parameters=self._finds_unused, init_sync=init_sync)
        if world == 1 and self.by_micro_batch:
            self._norm_hooks = GradNormHooks(self._parameters)

    def leave_group(self) -> None:
        """See `ReformableReplica`: without its wrapper, the replica holds nothing that has to do with the group."""
        self._abandon_update()
        if isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped._remove_autograd_hooks()
            # The wrapper may live on in a cycle, which the garbage collector sees late or, if it was frozen, never.
            vars(self._wrapped).clear()
        self._wrapped = self._loss_module
        self._bucket_stats = None
        self._loss_module.register_parameter("stats", None)
        if self._norm_hooks is not None:
            self._norm_hooks.remove()
            self._norm_hooks = None
        self._set_world(1)

    def reform(self, world: int) -> None:
        """See `ReformableReplica`."""
        self.leave_group()
        self._set_world(world)
        self._set_up_reduction(world, init_sync=False)

    def _compute_training_loss(self, loss_fn: LossFn, model: nn.Module, batch: Any) -> Loss:
        loss = super()._compute_training_loss(loss_fn, model, batch)
        if self._bucket_stats is None or not self._is_last_micro_batch or not self._finds_unused:
            return loss
        return self._bucket_stats.add_to_graph(loss)  # which DDP searches for what is unused

    def send_stats(self, row: StatsRow) -> None:
        (self._bucket_stats or self._stats).send(row)

    def receive_stats(self) -> torch.Tensor:
        return (self._bucket_stats or self._stats).receive()

    def _wrap_in_ddp(self, **options: Any) -> DistributedDataParallel:
        wrapped = DistributedDataParallel(
            self._loss_module,
            gradient_as_bucket_view=True,
            **{BUFFER_SYNC_ARG: False},  # type: ignore[arg-type]
            **options,
        )
        wrapped.register_comm_hook((weakref.ref(self), wrapped.process_group), sum_bucket)
        return wrapped

    def sum_bucket(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start to sum a bucket of gradients over the ranks, as DDP calls it."""
        gradients = bucket.buffer()
        if self._is_padding:
            gradients.zero_()
        if self._group_norms.measuring:
            self._bucket_norms += compute_norms([gradients])
        if self._bucket_stats is not None:
            self._bucket_stats.write(gradients)
        if bucket.is_last():
            self._is_reduced = True  # torch reduces the buckets in order
            self._clock.begin_wait()
        work = group.allreduce(gradients)  # the sum, begun but not awaited
        return work.get_future().then(lambda future: future.value()[0])

    def micro_batch(self, *, last: bool, is_padding: bool, shard: int) -> AbstractContextManager[None]:
        if last and self._static_graph and self._wrapped is self._loss_module:
            # DDP takes the first backward pass that it sees for the graph: it must not see the micro-batches before.
            self._wrapped = self._wrap_in_ddp(static_graph=True, init_sync=False)
        self._is_reduced = False
        context = super().micro_batch(last=last, is_padding=is_padding, shard=shard)
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return context
        return skip_reduction(self._wrapped, context)

    def _end_micro_batch(self) -> None:
        super()._end_micro_batch()
        if self._is_last_micro_batch and isinstance(self._wrapped, DistributedDataParallel):
            self._check_reduction(self._wrapped)

    def _check_reduction(self, ddp: DistributedDataParallel) -> None:
        """Check that every gradient of this update was summed over the ranks.

        Raises:
            TrainingFailed: a parameter had no gradient in the last micro-batch.
        """
        missing: list[str] = []
        if self._static_graph and self._is_reduced:  # what the first update did not use is never reduced
            if self._left_out is None:
                pairs = zip(self._trained_names, self._parameters, strict=True)
                self._left_out = {name: parameter for name, parameter in pairs if parameter.grad is None}
            missing = [name for name, parameter in self._left_out.items() if parameter.grad is not None]
        if missing or not self._is_reduced:
            missing = missing or find_unreduced(ddp, ["the statistics", *self._trained_names])
            fix = f"strategy.static_graph=false {FIND_UNUSED}" if self._static_graph else FIND_UNUSED
            raise make_unreduced_error(missing, dist.get_rank(), fix)

    def _join_reduction(self, total: torch.Tensor, usable: bool) -> torch.Tensor:
        if not self._static_graph:
            return super()._join_reduction(total, usable)
        if not usable:
            raise TrainingFailed(
                "a micro-batch without a target cannot be combined with strategy.static_graph=true: recipe.loss "
                "counted 0, and its total is not finite or does not depend on the model. No step was taken: type "
                "strategy.static_graph=false"
            )
        return total  # through the graph of the other micro-batches; the communication hook sends zeros for padding

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        try:
            super().backward(total, samples, count)
        except RuntimeError as error:
            if (final := translate_reducer_error(error, static_graph=self._static_graph)) is not None:
                raise final from error
            raise

    def _run_backward(self, total: torch.Tensor, gradient: torch.Tensor | None) -> None:
        stats = self._bucket_stats
        if stats is None or not self._is_last_micro_batch or self._finds_unused:
            super()._run_backward(total, gradient)
            return
        hook_writes = self._is_padding or self._group_norms.measuring  # all zeros, or the norm of the rest, comes first
        table = stats.make_gradient(late=hook_writes)
        torch.autograd.backward((total, stats.words), (gradient, table))

    def step(
        self, lr: float, momentum: float | None, loss_normalizer: float | torch.Tensor, clip_norm: float | None
    ) -> StepResult:
        gradients = [gradient for p in self._parameters if (gradient := p.grad) is not None]
        factor, counted = split_normalizer(loss_normalizer)
        if not gradients:
            return self._step_without_gradients(counted)
        multiply_gradients(gradients, factor)
        self._group_norms.close(self._bucket_norms)
        self._bucket_norms = []
        norm_sum, groups = self._pop_group_norms(self._precision.get_scale_tensor())
        self._precision.unscale(self.optimizer)
        total_norm = torch.linalg.vector_norm(torch.stack(compute_norms(gradients)))
        norm, finite = read_norm(total_norm)
        if clip_norm is not None:
            clip_grads_with_norm_(self._parameters, clip_norm, total_norm)
        set_lr_and_momentum(self.optimizer, lr, momentum)
        self._step_if_finite(finite, counted)
        norm = norm if counted is None else torch.where(counted, total_norm, torch.nan)
        return StepResult(norm=norm, finite=finite, group_sq_norm_sum=norm_sum, groups=groups)

    def _step_without_gradients(self, counted: torch.Tensor | None) -> StepResult:
        """No parameter has a gradient: nothing counted, which the host may not know yet.

        Raises:
            TrainingFailed: something counted.
        """
        if counted is not None and not bool(counted):
            return self.discard_update()
        raise TrainingFailed(
            "the loss depends on no trained parameter of model(): no step was taken; compute it from what model() "
            "returned, in which something is trained"
        )

    def exchange_stats(self, row: StatsRow) -> torch.Tensor:
        return super().exchange_stats(row if self._bucket_stats is None else self._bucket_stats.round(row))

    def restore(self, model: LazyTensors, optimizer: LazyTensors, facts: Mapping[str, Any]) -> None:
        self._adopt_buffers(model, facts)
        load_model_tensors(self.module, model)
        self._optimizer_state.load(optimizer, facts["optimizer"])
        self._load_facts(facts, optimizer)


def sum_bucket(
    state: tuple[weakref.ref[DdpReplica], dist.ProcessGroup], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """The communication hook. torch holds it where no garbage collector looks: it must not hold the replica."""
    reference, group = state
    replica = reference()
    assert replica is not None
    return replica.sum_bucket(group, bucket)


@contextmanager
def skip_reduction(ddp: DistributedDataParallel, context: AbstractContextManager[None]) -> Iterator[None]:
    """Within `context`, add to the gradients of this rank only."""
    with ddp.no_sync(), context:
        yield
