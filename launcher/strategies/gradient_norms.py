"""Per-group gradient norms, from which the noise scale is estimated: a few numbers per update.

A group is a part of the update's samples whose gradient is available separately: a rank's contribution to the sum, a
micro-batch, or a shard. Of each gradient only the norm is kept, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from launcher.plan.virtual_shards import compute_tree_sum

__all__ = ["GradNormHooks", "GroupGradNorms", "compute_norms", "read_norm"]

CHUNK_NUMEL = 1 << 20
PIECE_NUMEL = 1 << 16
#: Measuring every update would be noticeably slow: measure the first ones, for an early estimate, then every fourth.
#: Measuring each micro-batch (FIRST_UPDATES_WITH_HOOKS) costs more than measuring what ranks and shards contribute to
#: the sum.
FIRST_UPDATES, FIRST_UPDATES_WITH_HOOKS = 200, 40
MEASURE_EVERY = 4


def compute_norms(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Norms of the tensors in pieces, in fp32 at least: on a CPU, a long fp32 sum loses the differences of the groups.

    With six million elements the norm is too small by a relative 2e-4; in pieces of 65,536 elements by 2e-7.
    """
    pieces: list[torch.Tensor] = []
    for tensor in tensors:
        if tensor.numel() <= PIECE_NUMEL:
            pieces.append(tensor)
        else:
            pieces += split_contiguously(tensor)
    if not pieces:
        return []
    dtype = torch.float64 if torch.float64 in {piece.dtype for piece in pieces} else torch.float32
    return list(torch._foreach_norm(pieces, 2, dtype))


def read_norm(norm: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | bool]:
    """A norm and whether it is finite: numbers on a CPU, where the host has them at once, else device scalars."""
    if not norm.is_cpu:
        return norm, torch.isfinite(norm)
    value = norm.item()
    return value, math.isfinite(value)


def split_contiguously(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Split into views that are contiguous in memory, for any memory layout."""
    outer = max(range(tensor.ndim), key=tensor.stride)
    return tensor.split(max(1, PIECE_NUMEL * tensor.shape[outer] // tensor.numel()), outer)


class GroupGradNorms:
    """Sums |h|²/c over this rank's groups: h is the group's contribution to the gradient, c its loss count.

    Over all groups of an update of B samples, B² times this sum is the sum of c |g|², where g is the group's own mean
    gradient.
    """

    def __init__(self, device: torch.device) -> None:
        self._nothing = torch.zeros((), dtype=torch.float64, device=device)
        self._count = 0.0
        self._groups: list[tuple[float, Sequence[torch.Tensor]]] = []

    def add_count(self, count: float) -> None:
        """Add a micro-batch to the current group. A group whose count is 0 is ignored."""
        self._count += count

    @property
    def measuring(self) -> bool:
        """Whether the current group has a count above 0."""
        return self._count > 0

    def close(self, norms: Sequence[torch.Tensor]) -> None:
        """Complete the current group; `norms` are the norms of the pieces of its h."""
        if norms and self._count:
            self._groups.append((self._count, norms))
        self._count = 0.0

    def pop(self, scale: torch.Tensor | float) -> tuple[torch.Tensor, int]:
        """Return the sum, corrected for gradients scaled by `scale`, and the number of groups; then reset."""
        groups, self._groups, self._count = self._groups, [], 0.0
        if not groups:
            return self._nothing, 0
        squares = torch.stack([norm for _, norms in groups for norm in norms]).double().square()
        parts = squares.split([len(norms) for _, norms in groups])
        total = compute_tree_sum(part.sum() / count for part, (count, _) in zip(parts, groups, strict=True))
        return total / scale**2, len(groups)


class GradNormHooks:
    """Takes the norm of each parameter's gradient as backward produces it, before it is accumulated.

    Small gradients are held until they total a million elements: a kernel for each would be noticeably slow.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        self.enabled = False
        self._pending: list[torch.Tensor] = []
        self._elements = 0
        self._norms: list[torch.Tensor] = []
        self._handles = [self.register(parameter) for parameter in parameters]

    def register(self, parameter: torch.Tensor) -> RemovableHandle:
        return parameter.register_hook(self._on_gradient)

    def remove(self) -> None:
        """Take the hooks off the parameters that these were made with."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_gradient(self, gradient: torch.Tensor) -> None:
        if not self.enabled:
            return
        elements = gradient.numel()
        if elements > PIECE_NUMEL:
            self._norms += compute_norms([gradient])
            return
        self._pending.append(gradient)  # the tensor itself, not a view: autograd then does not modify it in place
        self._elements += elements
        if self._elements >= CHUNK_NUMEL:
            self._flush_pending()

    def _flush_pending(self) -> None:
        if self._pending:
            self._norms += compute_norms([torch.cat([gradient.reshape(-1) for gradient in self._pending])])
        self._pending, self._elements = [], 0

    def pop_norms(self) -> list[torch.Tensor]:
        """Norms of the gradients since the last call."""
        self._flush_pending()
        norms, self._norms = self._norms, []
        return norms
