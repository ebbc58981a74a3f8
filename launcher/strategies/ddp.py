"""The model whole on every rank, gradients summed by DistributedDataParallel."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from launcher.optim import (
    Groups,
    Precision,
    apply_rate,
    load_optimizer,
    make_optimizer,
    optimizer_facts,
    optimizer_tensors,
    reads_found_inf,
)
from launcher.settings import Run
from launcher.strategies import Step
from launcher.telemetry import StageClock

__all__ = ["DdpReplica"]

#: The argument's name changed in torch 2.13. What buffers need, `settle_buffers` does.
NO_BUFFER_SYNC = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class DdpReplica:
    """The gradient is the sum over ranks of d(total)/samples: right for any shares, so nothing divides by the world.

    That is why the communication hook sums. It also gives the clock its mark (from the last bucket on, the backward
    pass only waits), and sends zeros for a rank that has nothing but a pad, whatever the pad's own gradient is.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        world: int,
        precision: Precision,
        clock: StageClock,
        groups: Groups | None = None,
    ) -> None:
        self.bare = model
        self._world = world
        self._precision = precision
        self._clock = clock
        self._pad = False
        self._fresh = True
        self.model: nn.Module = model if world == 1 else self._distributed(model, run)
        self.optimizer = make_optimizer(model, run, groups)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [b for b in model.buffers() if b is not None]
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

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
        if bucket.is_last():
            self._clock.mark()
        work = dist.all_reduce(gradients, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    @contextmanager
    def micro(self, *, last: bool, pad: bool, place: int) -> Iterator[None]:
        self._pad = pad
        if self._fresh:
            self._keep_buffers()
        silent = self.model.no_sync() if not last and isinstance(self.model, DistributedDataParallel) else nullcontext()
        with silent, self._untouched() if pad else nullcontext():
            yield

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """A pad leaves no trace in running statistics, and is not refused for being a single sample."""
        before = [buffer.clone() for buffer in self._buffers]
        training = [norm for norm in self._norms if norm.training]
        for norm in training:
            norm.training = False
        try:
            yield
        finally:
            for norm in training:
                norm.training = True
            for buffer, old in zip(self._buffers, before, strict=True):
                buffer.copy_(old)

    def backward(self, total: torch.Tensor, samples: int) -> None:
        self._precision.scaled(total / samples).backward()

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        """Remember the buffers as they are before an update, so that a skipped one can be undone."""
        self._fresh = False
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def step(self, lr: float, momentum: float | None, rescale: float, clip_norm: float | None) -> Step:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if rescale != 1.0:
            torch._foreach_mul_(gradients, rescale)
        self._precision.unscale(self.optimizer)
        norm = get_total_norm(gradients)
        finite = torch.isfinite(norm)
        if clip_norm is not None:
            clip_grads_with_norm_(self._parameters, clip_norm, norm)
        apply_rate(self.optimizer, lr, momentum)
        self._apply(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._fresh = True
        return Step(norm=norm, finite=finite)

    def _apply(self, finite: torch.Tensor) -> None:
        """Step where the gradient is finite; else leave parameters, moments, steps and buffers as they were.

        torch makes a momentum's memory before it looks at `found_inf`, and would later take what lay there for it: so
        the first step that is taken is decided here.
        """
        if finite.device.type == "cuda" and reads_found_inf(self.optimizer) and self.optimizer.state:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            for kept, buffer in zip(self._kept, self._buffers, strict=True):
                torch.where(finite, buffer, kept, out=buffer)
        elif bool(finite):
            self.optimizer.step()
        else:
            for kept, buffer in zip(self._kept, self._buffers, strict=True):
                buffer.copy_(kept)
        self._precision.stepped()

    @torch.no_grad()
    def settle_buffers(self) -> None:
        if self._world == 1:
            return
        for buffer in self._buffers:
            if buffer.is_floating_point():
                dist.broadcast(buffer, src=0)

    def tensors(self) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor], Mapping[str, Any]]:
        facts = {"optimizer": optimizer_facts(self.optimizer, self.bare), "scaler": self._precision.facts()}
        return self.bare.state_dict(), optimizer_tensors(self.optimizer, self.bare), facts

    def restore(
        self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        self.bare.load_state_dict(dict(model))
        load_optimizer(self.optimizer, self.bare, optimizer, facts["optimizer"])
        self._precision.restore(facts["scaler"])
