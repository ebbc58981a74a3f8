"""The factor on an update's gradients, from a mean over samples to a mean over what the loss counts.

It is a number where the host knows the loss count, else a scalar on the device, which the host does not read.
"""

from __future__ import annotations

import torch

__all__ = ["multiply_gradients", "split_normalizer"]


def split_normalizer(normalizer: float | torch.Tensor) -> tuple[float | torch.Tensor, torch.Tensor | None]:
    """Return the factor, and on the device whether the loss counted anything: if not, the factor is 1.

    The second value is None for a number, with which the host has decided that.
    """
    if not isinstance(normalizer, torch.Tensor):
        return normalizer, None
    counted = torch.isfinite(normalizer)
    return torch.where(counted, normalizer, 1.0), counted


def multiply_gradients(gradients: list[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply in place; a number that is 1 costs nothing."""
    if isinstance(factor, torch.Tensor):
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0]))  # offloaded ones are on the CPU
    elif factor != 1.0:
        torch._foreach_mul_(gradients, factor)
