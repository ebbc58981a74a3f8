"""Whether an optimizer treats each element of a parameter by itself, so that it may see flat shards of parameters."""

from __future__ import annotations

import logging
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


def check_elementwise(config: RunConfig, device: torch.device) -> None:
    """Check on a small parameter that an optimizer of the user's takes the same steps on flat pieces of it.

    torch's own optimizers are checked by name, when the configuration is. One that cannot step the whole small
    parameter, e.g. because of its size, is not judged.

    Raises:
        UsageError: the steps differ, or the optimizer can step the whole parameter but not flat pieces of it.
    """
    target = str(config.optimizer["_target_"])
    if target.startswith("torch.optim."):
        return
    if config.strategy.offload:
        device = torch.device("cpu")
    try:
        whole = train_pieces(config, [(ROWS, COLUMNS)], device)
    except Exception as problem:
        logging.getLogger("launcher").debug("not checked for flat shards: %r", problem)
        return
    try:
        cut = train_pieces(config, [(CUT,), (ROWS * COLUMNS - CUT,)], device)
    except Exception as problem:
        cause = problem.__cause__ if isinstance(problem, UsageError) and problem.__cause__ else problem
        why = f"cannot step flat pieces of a parameter ({type(cause).__name__}: {' '.join(str(cause).split())})"
        raise refuse(config, why) from problem
    if not torch.allclose(whole, cut, rtol=1e-5, atol=1e-7, equal_nan=True):
        raise refuse(config, "does not treat each element of a parameter by itself")


def refuse(config: RunConfig, why: str) -> UsageError:
    return UsageError(
        f"optimizer={str(config.optimizer['_target_']).rpartition('.')[2]} {why}, and "
        f"strategy.stage={config.strategy.stage} gives it flat shards of parameters: type strategy.stage=0 or "
        "strategy=ddp"
    )


def train_pieces(config: RunConfig, shapes: Sequence[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """The elements of parameters of these shapes after a few steps, the same values and gradients for any shapes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    values, *gradients = torch.randn(1 + STEPS, sum(sizes), generator=generator).to(device).unbind()
    pieces = zip(values.split(sizes), shapes, strict=True)
    model = nn.ParameterList([nn.Parameter(piece.reshape(shape).clone()) for piece, shape in pieces])
    optimizer = make_optimizer(model, replace(config, train=replace(config.train, decay_norms=True)))
    set_lr_and_momentum(optimizer, float(config.lr.base or 0.1), momentum=None)
    for gradient in gradients:
        for parameter, piece in zip(model, gradient.split(sizes), strict=True):
            parameter.grad = piece.reshape(parameter.shape).clone()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model])
