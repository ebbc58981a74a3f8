"""Behaviour common to all strategies: buffers, padding micro-batches, and skipping steps that are not finite."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.blocks import unchanged
from launcher.optim import Precision, reads_found_inf
from launcher.parts import Place
from launcher.strategies.gauge import EVERY, FIRST, FIRST_HEARD, Gauge, Listener
from launcher.telemetry import StageClock

__all__ = ["Rank", "before_wait", "even_parts", "waited"]

#: Adam's average of squared gradients, and AMSGrad's maximum of it.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})


class Rank:
    """A model whose buffers are local to each rank, and an optimizer that skips non-finite updates."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, world: int, precision: Precision) -> None:
        self.bare = model
        self._world = world
        self._precision = precision
        self._pad = False
        self._single: bool | None = None
        self._fresh = True
        self._buffers = [b for b in model.buffers() if b is not None]
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self._gauge = Gauge(precision.device)
        self._listener: Listener | None = None  # set if micro-batches are the groups for the noise scale
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @contextmanager
    def micro(self, *, last: bool, pad: bool, place: int) -> Iterator[None]:
        self._pad = pad
        if self._fresh:
            self._keep_buffers()
        self._single = last and self._single is not False
        with self._untouched() if pad else nullcontext():
            yield
        if self._listener is not None and self._listener.on:
            self._listener.on = False
            self._gauge.close(self._listener.norms())

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Keep running statistics unchanged during a padding micro-batch.

        BatchNorm is in evaluation mode meanwhile, so that it accepts a single sample.
        """
        training = [norm for norm in self._norms if norm.training]
        for norm in training:
            norm.training = False
        try:
            with unchanged(self._buffers):
                yield
        finally:
            for norm in training:
                norm.training = True

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        self._listen(0.0 if self._pad else count)
        self._precision.scaled(total / samples).backward()

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        """Save the buffers before an update, so that they can be restored if the update is skipped."""
        self._fresh = False
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def _measured(self, scale: torch.Tensor | float) -> tuple[torch.Tensor, int]:
        """This rank's sum of group gradient norms and the number of groups; the gradients were scaled by `scale`."""
        self._single = None
        return self._gauge.take(scale)

    def measures(self, update: int) -> bool:
        return update < (FIRST if self._listener is None else FIRST_HEARD) or update % EVERY == 0

    def _listen(self, count: float) -> None:
        """Measure the next backward pass, with loss count `count`; a lone micro-batch has no other to compare with."""
        self._gauge.counts(count)
        if self._listener is not None:
            self._listener.on = count > 0 and (self._world > 1 or not self._single)

    def _finish(self, finite: torch.Tensor) -> None:
        """Step if the gradient is finite; else leave parameters, moments, step counts and buffers unchanged.

        torch allocates momentum buffers before it checks `found_inf` and would later use their uninitialised contents,
        so the first applied step is decided on the host.
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
        self._adjust(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._fresh = True

    @torch.no_grad()
    def rescale_moments(self, factor: float) -> None:
        for state in self._optimizer_state():
            for slot in SECOND_MOMENTS & state.keys():
                state[slot].mul_(factor)

    def _optimizer_state(self) -> Iterable[dict[str, Any]]:
        return self.optimizer.state.values()

    def _adjust(self, finite: torch.Tensor) -> None:
        """Update the loss scale after the step."""
        self._precision.stepped()

    @torch.no_grad()
    def settle_buffers(self) -> None:
        if self._world == 1:
            return
        for buffer in self._buffers:
            if buffer.is_floating_point():
                dist.broadcast(buffer, src=0)


def even_parts(group: Mapping[str, torch.Tensor], places: dict[str, Place]) -> dict[str, torch.Tensor]:
    """Slice tensors that every rank holds in full into equal parts, one per rank; record their positions in `places`.

    Tensors that are not floating-point (counters) are taken from rank 0, since they are not synchronised across ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    cut: dict[str, torch.Tensor] = {}
    for name, tensor in group.items():
        if not tensor.is_floating_point():
            cut.update({name: tensor} if rank == 0 else {})
            continue
        start, stop = (tensor.numel() * one // world for one in (rank, rank + 1))
        places[name] = Place(tuple(tensor.shape), start)
        cut[name] = tensor.detach().reshape(-1)[start:stop]
    return cut


def before_wait(clock: StageClock) -> Callable[..., None]:
    """A hook for the start of a wait for other ranks: the time before it counts as the current pass's own work."""

    def hook(*_: object) -> None:
        if (stage := under_way()) is not None:
            clock.lap(stage)

    return hook


def waited(clock: StageClock) -> Callable[..., None]:
    """A hook for the end of a wait: the time since its start counts as `sync`."""

    def hook(*_: object) -> None:
        if under_way() is not None:
            clock.lap("sync")

    return hook


def under_way() -> str | None:
    """The current pass, forward or backward; None outside training. Activation recomputation counts as backward."""
    if torch._C._current_graph_task_id() >= 0:
        return "backward"
    return "forward" if torch.is_grad_enabled() else None
