"""A recipe with a known gradient noise scale: points around a centre at distance 1, loss half the squared distance.

With a learning rate near zero the parameters stay at the start, where a sample's gradient is minus its point: the mean
has norm 1, and the points are scaled so that their mean squared distance from it is exactly `noise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launcher.recipe import Loss


class Where(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(width))

    def forward(self, points: Tensor) -> Tensor:
        return points - self.at


@dataclass(frozen=True)
class Quadratic:
    noise: float = 30.0
    width: int = 100
    samples: int = 20_000
    points_seed: int = 0

    def model(self) -> nn.Module:
        return Where(self.width)

    def dataset(self, split: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.points_seed)
        points = torch.randn(self.samples, self.width, generator=generator)
        points -= points.mean(0)
        points *= (self.noise / points.square().sum(1).mean()).sqrt()
        points[:, 0] += 1
        return points

    def loss(self, model: nn.Module, batch: Tensor) -> Loss:
        return Loss(model(batch).square().sum() / 2, len(batch))
