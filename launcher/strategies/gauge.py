"""How much the parts of an update's gradient differ: what the noise scale is worked out from, a few numbers per update.

A group is a part of the update's samples whose gradient is seen by itself: what a rank gives to the sum, a micro-batch,
or a shard. Nothing is kept of a gradient but its square norm, on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch

from launcher.shards import tree_sum

__all__ = ["Gauge", "Listener", "norms"]

CHUNK = 1 << 20
PIECE = 1 << 16


def norms(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of pieces of the tensors, in fp32 at least: on a CPU a long sum in fp32 loses what groups differ by.

    Six million elements give a norm that is 2e-4 too small; in pieces of 65,536 that is 2e-7.
    """
    pieces = [piece for tensor in tensors for piece in cut(tensor.detach())]
    dtype = reduce(torch.promote_types, {piece.dtype for piece in pieces}, torch.float32)
    return list(torch._foreach_norm(pieces, 2, dtype)) if pieces else []


def cut(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views that lie together in memory, whatever the layout."""
    if tensor.numel() <= PIECE:
        return (tensor,)
    outer = max(range(tensor.ndim), key=tensor.stride)
    return tensor.split(max(1, PIECE * tensor.shape[outer] // tensor.numel()), outer)


class Gauge:
    """Adds up |h|²/c over this rank's groups: h is what a group adds to the gradient, c what its losses count.

    Over all groups of an update of B samples, B² times that is the sum of c |g|², g the group's own mean gradient.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._count = 0.0
        self._groups: list[torch.Tensor] = []

    def counts(self, count: float) -> None:
        """One more micro-batch of the group under way. A group that counts nothing is none."""
        self._count += count

    def close(self, norms: Sequence[torch.Tensor]) -> None:
        """The group is complete; `norms` are those of the pieces of its h."""
        if norms and self._count:
            self._groups.append(torch.stack(list(norms)).double().square().sum() / self._count)
        self._count = 0.0

    def take(self, scale: torch.Tensor | float) -> tuple[torch.Tensor, int]:
        """The sum of gradients that were `scale` times too large, and how many groups; then it starts anew."""
        groups, self._groups, self._count = self._groups, [], 0.0
        total = tree_sum(groups) if groups else torch.zeros((), dtype=torch.float64, device=self._device)
        return total / scale**2, len(groups)


class Listener:
    """Takes the norm of each parameter's gradient as backward gives it, before it is added to what is there.

    Small gradients are held until a million elements have come together, for one kernel: a launch each would show.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        self.on = False
        self._waiting: list[torch.Tensor] = []
        self._elements = 0
        self._norms: list[torch.Tensor] = []
        for parameter in parameters:
            self.listen(parameter)

    def listen(self, parameter: torch.Tensor) -> None:
        parameter.register_hook(self._heard)

    def _heard(self, gradient: torch.Tensor) -> None:
        if self.on:
            self._waiting.append(gradient)
            self._elements += gradient.numel()
            if self._elements >= CHUNK:
                self._measure()

    def _measure(self) -> None:
        self._norms += norms(self._waiting)
        self._waiting, self._elements = [], 0

    def norms(self) -> list[torch.Tensor]:
        """Of the gradients since it was last asked."""
        self._measure()
        heard, self._norms = self._norms, []
        return heard
