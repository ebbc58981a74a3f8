"""Mixed precision: autocast, loss scaling and the dtype of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Precision"]

INITIAL_LOSS_SCALE = 65536.0  # for a loss that is a mean; torch's default
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NO_AUTOCAST = nullcontext()


@dataclass(frozen=True)
class Precision:
    """Precision of the forward and backward pass: autocast dtype, parameter dtype and loss scaling.

    fp32, bf16 and fp16 keep fp32 parameters; bf16 and fp16 autocast; fp64 is double throughout. Only fp16 scales its
    losses, since its smallest gradients would underflow otherwise.
    """

    name: str
    device: torch.device
    scaler: torch.amp.GradScaler | None = field(default=None)

    @classmethod
    def from_name(cls, name: str, device: torch.device) -> Precision:
        scaler = torch.amp.GradScaler(device.type, INITIAL_LOSS_SCALE) if name == "fp16" else None
        return cls(name, device, scaler)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and floating-point inputs."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        lower = AUTOCAST_DTYPES.get(self.name)
        return NO_AUTOCAST if lower is None else torch.autocast(self.device.type, dtype=lower)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def update(self) -> None:
        """Update the loss scale: it shrinks after an overflow and grows after many steps without one."""
        if self.scaler is not None:
            self.scaler.update()

    def get_scale_tensor(self) -> torch.Tensor | float:
        """The loss scale that `scale_loss` multiplies by, without a device synchronisation."""
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def scale(self) -> float:
        """The loss scale that `scale_loss` multiplies by; synchronises with the device."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def update_scale(self, *, finite: bool) -> None:
        """Update the loss scale for a strategy that detects overflow itself, in place of `unscale` and `update`.

        torch's scaler only inspects gradients, so it is given a dummy one.
        """
        if self.scaler is None:
            return
        probe = torch.zeros(1, device=self.device, requires_grad=True)
        probe.grad = torch.full_like(probe, 0.0 if finite else math.inf)
        self.scaler.unscale_(torch.optim.SGD([probe], lr=0.0))
        self.scaler.update()

    def lower_scale(self, items_per_sample: float) -> None:
        """After an overflow in the first updates: lower the loss scale to where that of a mean would start.

        A loss that counts many items per sample, as tokens, is divided by the samples, so its gradient is as much
        larger. Halving the scale by one update each would skip as many updates.
        """
        if self.scaler is None or items_per_sample <= 1:
            return
        limit = INITIAL_LOSS_SCALE / 2 ** math.ceil(math.log2(items_per_sample))
        if self.scale() > limit:
            self.scaler.update(limit)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, facts: Mapping[str, Any]) -> None:
        if self.scaler is not None and facts:
            self.scaler.load_state_dict(dict(facts))
