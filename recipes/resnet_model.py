"""ResNet-18, 34 and 50 (He et al. 2015, arXiv 1512.03385), with an additional stem for small images."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["resnet"]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def make_conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def make_norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(min(8, channels), channels)


class Block(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 (`deep`), with a shortcut around them."""

    def __init__(self, inputs: int, width: int, stride: int, norm: str, deep: bool) -> None:
        super().__init__()
        outputs = width * 4 if deep else width
        if deep:
            layers = [make_conv(inputs, width, 1), make_conv(width, width, 3, stride), make_conv(width, outputs, 1)]
        else:
            layers = [make_conv(inputs, width, 3, stride), make_conv(width, outputs, 3)]
        self.convs = nn.ModuleList(layers)
        self.norms = nn.ModuleList(make_norm(norm, layer.out_channels) for layer in layers)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(make_conv(inputs, outputs, 1, stride), make_norm(norm, outputs))
        nn.init.zeros_(self.norms[-1].weight)  # each block starts as the identity (Goyal 2017, 5.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for index, (layer, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(layer(y))
            if index < len(self.convs) - 1:
                y = torch.relu(y)
        return torch.relu(y + self.shortcut(x))


def resnet(depth: int, width: int, channels: int, classes: int, norm: str, *, large: bool) -> nn.Sequential:
    """Images (n, channels, height, width) to logits (n, classes). `large`: the paper's stem, 7 x 7 and max pooling."""
    deep = depth == 50
    stem: list[nn.Module] = (
        [make_conv(channels, width, 7, 2), make_norm(norm, width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        if large
        else [make_conv(channels, width, 3), make_norm(norm, width), nn.ReLU()]
    )
    blocks: list[nn.Module] = []
    inputs = width
    for stage, count in enumerate(BLOCKS[depth]):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(Block(inputs, width * 2**stage, stride, norm, deep))
            inputs = width * 2**stage * (4 if deep else 1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*stem, *blocks, *head)
