"""DDP: the full model on every rank, gradients summed by DistributedDataParallel."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from launcher.checkpoint import Stored
from launcher.optim import (
    apply_rate,
    load_optimizer,
    make_optimizer,
    optimizer_facts,
    optimizer_tensors,
)
from launcher.parts import Place
from launcher.settings import Run
from launcher.strategies import Given, Shards, State, Step
from launcher.strategies.base import Rank, even_parts
from launcher.strategies.gauge import Listener, norms

__all__ = ["DdpReplica"]

#: The argument was renamed in torch 2.13. Buffers are synchronised by `broadcast_buffers` of the replica instead.
NO_BUFFER_SYNC = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class DdpReplica(Rank):
    """DDP whose gradient is the sum over ranks of d(total)/samples, which is correct for any shares.

    So nothing is divided by the world size, and the communication hook sums. The hook also marks the clock at the last
    bucket, after which the backward pass only waits, and sends zeros from a rank that has only padding, whatever the
    gradient of the padding is. In the hook, each rank's own gradient is visible: the ranks are the groups for the noise
    scale; with a single worker, the micro-batches are.
    """

    sharded = False
    by_micro_batch = True

    def __init__(self, given: Given) -> None:
        model, run = given.model, given.run
        super().__init__(model.to(given.precision.device), given.world, given.precision)
        self._clock = given.clock
        self.model: nn.Module = model if given.world == 1 else self._distributed(model, run)
        self.optimizer = make_optimizer(model, run, given.groups)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._own: list[torch.Tensor] = []
        if given.world == 1 and self.by_micro_batch:
            self._listener = Listener(self._parameters)

    def _distributed(self, model: nn.Module, run: Run) -> DistributedDataParallel:
        wrapped = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            find_unused_parameters=run.strategy.find_unused_parameters,
            **{NO_BUFFER_SYNC: False},  # type: ignore[arg-type]
        )
        wrapped.register_comm_hook(None, self._sum)
        return wrapped

    def _sum(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradients = bucket.buffer()
        if self._pad:
            gradients.zero_()
        if self._gauge.measuring:
            self._own += norms([gradients])
        if bucket.is_last():
            self._clock.mark()
        work = dist.all_reduce(gradients, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    @contextmanager
    def micro(self, *, last: bool, pad: bool, place: int) -> Iterator[None]:
        silent = self.model.no_sync() if not last and isinstance(self.model, DistributedDataParallel) else nullcontext()
        with silent, super().micro(last=last, pad=pad, place=place):
            yield

    @torch.no_grad()
    def step(self, lr: float, momentum: float | None, rescale: float, clip_norm: float | None) -> Step:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if rescale != 1.0:
            torch._foreach_mul_(gradients, rescale)
        self._gauge.close(self._own)
        self._own = []
        spread, groups = self._measured(self._precision.factor())
        self._precision.unscale(self.optimizer)
        norm = torch.linalg.vector_norm(torch.stack(norms(gradients)))
        finite = torch.isfinite(norm)
        if clip_norm is not None:
            clip_grads_with_norm_(self._parameters, clip_norm, norm)
        apply_rate(self.optimizer, lr, momentum)
        self._finish(finite)
        return Step(norm=norm, finite=finite, spread=spread, groups=groups)

    def tensors(self) -> State:
        facts = {"optimizer": optimizer_facts(self.optimizer, self.bare), "scaler": self._precision.facts()}
        return State(self.bare.state_dict(), optimizer_tensors(self.optimizer, self.bare), facts)

    def shards(self) -> Shards:
        """Every rank holds the full state and returns an equal slice of it."""
        model, optimizer, facts = self.tensors()
        places: dict[str, Place] = {}
        return Shards(State(even_parts(model, places), even_parts(optimizer, places), facts), places)

    def restore(self, model: Stored, optimizer: Stored, facts: Mapping[str, Any]) -> None:
        self.bare.load_state_dict(dict(model))
        load_optimizer(self.optimizer, self.bare, optimizer, facts["optimizer"])
        self._precision.restore(facts["scaler"])
