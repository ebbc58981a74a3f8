"""Whether an optimizer treats each element of a parameter by itself, so that it may see flat shards of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.strategies.optimizer import make_optimizer, set_lr_and_momentum

__all__ = ["check_elementwise"]

ROWS, COLUMNS, CUT = 4, 3, 7
STEPS = 3


def check_elementwise(config: RunConfig) -> None:
    """Check on a small parameter that an optimizer of the user's takes the same steps on flat pieces of it.

    torch's own optimizers are checked by name, when the configuration is.

    Raises:
        UsageError: the steps differ, or the optimizer refuses one-dimensional parameters.
    """
    target = str(config.optimizer["_target_"])
    if target.startswith("torch.optim."):
        return
    whole = train_pieces(config, [(ROWS, COLUMNS)])
    try:
        cut = train_pieces(config, [(CUT,), (ROWS * COLUMNS - CUT,)])
        same = torch.allclose(whole, cut, rtol=1e-5, atol=1e-7)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        same = False
    if not same:
        raise UsageError(
            f"optimizer={target.rpartition('.')[2]} does not treat each element of a parameter by itself, and "
            f"strategy.stage={config.strategy.stage} gives it flat shards of parameters: type strategy.stage=0 or "
            "strategy=ddp"
        )


def train_pieces(config: RunConfig, shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The elements of parameters of these shapes after a few steps, the same values and gradients for any shapes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    values, *gradients = torch.randn(1 + STEPS, sum(sizes), generator=generator).unbind()
    pieces = zip(values.split(sizes), shapes, strict=True)
    model = nn.ParameterList([nn.Parameter(piece.reshape(shape).clone()) for piece, shape in pieces])
    optimizer = make_optimizer(model, replace(config, train=replace(config.train, decay_norms=True)))
    set_lr_and_momentum(optimizer, float(config.lr.base or 0.1), momentum=None)
    for gradient in gradients:
        for parameter, piece in zip(model, gradient.split(sizes), strict=True):
            parameter.grad = piece.reshape(parameter.shape).clone()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model])
