"""How much the parts of an update's gradient differ: what the noise scale is worked out from, a few numbers per update.

A group is a part of the update's samples whose gradient is seen by itself: what a rank gives to the sum, a micro-batch,
or a shard. Nothing is kept of a gradient but its square norm, on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from launcher.shards import tree_sum

__all__ = ["Gauge", "Listener", "norms"]

CHUNK = 1 << 20
PIECE = 1 << 16
#: Measuring every update would show: it is the first ones, so that something is known soon, and every fourth from then
#: on. Hearing each micro-batch by itself costs more than what ranks and shards give to the sum.
FIRST, FIRST_HEARD = 200, 40
EVERY = 4


def norms(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of pieces of the tensors, in fp32 at least: on a CPU a long sum in fp32 loses what groups differ by.

    Six million elements give a norm that is 2e-4 too small; in pieces of 65,536 that is 2e-7.
    """
    pieces: list[torch.Tensor] = []
    for tensor in tensors:
        pieces += [tensor] if tensor.numel() <= PIECE else cut(tensor)
    double = any(piece.dtype is torch.float64 for piece in pieces)
    return list(torch._foreach_norm(pieces, 2, torch.float64 if double else torch.float32)) if pieces else []


def cut(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views that lie together in memory, whatever the layout."""
    outer = max(range(tensor.ndim), key=tensor.stride)
    return tensor.split(max(1, PIECE * tensor.shape[outer] // tensor.numel()), outer)


class Gauge:
    """Adds up |h|²/c over this rank's groups: h is what a group adds to the gradient, c what its losses count.

    Over all groups of an update of B samples, B² times that is the sum of c |g|², g the group's own mean gradient.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._count = 0.0
        self._groups: list[tuple[float, Sequence[torch.Tensor]]] = []

    def counts(self, count: float) -> None:
        """One more micro-batch of the group under way. A group that counts nothing is none."""
        self._count += count

    @property
    def measuring(self) -> bool:
        """Whether the group under way counts anything."""
        return self._count > 0

    def close(self, norms: Sequence[torch.Tensor]) -> None:
        """The group is complete; `norms` are those of the pieces of its h."""
        if norms and self._count:
            self._groups.append((self._count, norms))
        self._count = 0.0

    def take(self, scale: torch.Tensor | float) -> tuple[torch.Tensor, int]:
        """The sum of gradients that were `scale` times too large, and how many groups; then it starts anew."""
        groups, self._groups, self._count = self._groups, [], 0.0
        if not groups:
            return torch.zeros((), dtype=torch.float64, device=self._device), 0
        squares = torch.stack([norm for _, norms in groups for norm in norms]).double().square()
        parts = squares.split([len(norms) for _, norms in groups])
        total = tree_sum(part.sum() / count for part, (count, _) in zip(parts, groups, strict=True))
        return total / scale**2, len(groups)


class Listener:
    """Takes the norm of each parameter's gradient as backward gives it, before it is added to what is there.

    Small gradients are held until a million elements have come together: a kernel for each would show.
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
        if not self.on:
            return
        elements = gradient.numel()
        if elements > PIECE:
            self._norms += norms([gradient])
            return
        self._waiting.append(gradient)  # itself, not a view: what holds it may not be changed in place
        self._elements += elements
        if self._elements >= CHUNK:
            self._measure()

    def _measure(self) -> None:
        if self._waiting:
            self._norms += norms([torch.cat([gradient.reshape(-1) for gradient in self._waiting])])
        self._waiting, self._elements = [], 0

    def norms(self) -> list[torch.Tensor]:
        """Of the gradients since it was last asked."""
        self._measure()
        heard, self._norms = self._norms, []
        return heard
