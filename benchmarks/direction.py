"""Measurements on the digits that a sweep cannot make: gradient direction by batch size, and faulty accumulation.

    python benchmarks/direction.py direction      # cosine of batch gradient and full gradient, by batch size
    python benchmarks/direction.py accumulation   # missing division, leaking tail, and correct
    python benchmarks/direction.py classes        # the noise scale by the number of classes

The first is compared with 1 / sqrt(1 + phi / B), predicted from the noise scale phi (McCandlish 2018, appendix A.1).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from launcher.recipes.mlp import Mlp
from torch import nn

from launcher.goodput.noise_scale import estimate_variance_and_square
from launcher.plan.sample_order import SamplePermutation

SEEDS = 5
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ACCUMULATION = 4


def make_model_and_data(seed: int, recipe: Mlp) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A new model, and the images and labels of the training set."""
    torch.manual_seed(seed)
    data = recipe.dataset("train")
    return recipe.model(), data.inputs, data.targets


def compute_gradient(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean gradient over the samples, flattened."""
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, updates: int, seed: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for update in range(updates):
        rows = list(SamplePermutation(len(images), seed, update)[:32])
        compute_gradient(model, images[rows], labels[rows])
        optimizer.step()


def compute_noise_scale(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The full gradient and the exact noise scale, computed from every sample's gradient."""
    whole = compute_gradient(model, images, labels)
    squares = [
        float(compute_gradient(model, images[i : i + 1], labels[i : i + 1]).square().sum()) for i in range(len(images))
    ]
    variance, square = estimate_variance_and_square([1.0] * len(images), squares, float(whole.square().sum()))
    return whole, variance / square


def measure_direction() -> None:
    for updates in (0, 100, 400):
        cosines: dict[int, list[float]] = {size: [] for size in SIZES}
        scales = []
        for seed in range(SEEDS):
            model, images, labels = make_model_and_data(seed, Mlp())
            train(model, images, labels, updates, seed)
            whole, phi = compute_noise_scale(model, images, labels)
            scales.append(phi)
            for size in SIZES:
                for draw in range(20):
                    rows = list(SamplePermutation(len(images), seed, 1000 + draw)[:size])
                    part = compute_gradient(model, images[rows], labels[rows])
                    cosines[size].append(float(torch.cosine_similarity(part, whole, dim=0)))
        phi = statistics.median(scales)
        print(f"after {updates} updates: phi = {phi:.0f} samples ({min(scales):.0f} to {max(scales):.0f})")
        for size in SIZES:
            promised = (1 + phi / size) ** -0.5
            print(f"  batch {size:4}   cosine {statistics.fmean(cosines[size]):.3f}   predicted {promised:.3f}")


def measure_classes() -> None:
    for count in (2, 4, 6, 8, 10):
        found = []
        for seed in range(SEEDS):
            model, images, labels = make_model_and_data(seed, Mlp(classes=count))
            train(model, images, labels, 100, seed)
            found.append(compute_noise_scale(model, images, labels)[1])
        print(f"{count:2} classes   phi {statistics.median(found):6.1f}   ({min(found):.1f} to {max(found):.1f})")


def measure_accumulation() -> None:
    optimizers = {
        "SGD 0.2": lambda model: torch.optim.SGD(model.parameters(), lr=0.2),
        "SGD 0.5": lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        "Adam 0.003": lambda model: torch.optim.Adam(model.parameters(), lr=0.003),
    }
    for kind, make in optimizers.items():
        for way in ("right", "forgets to divide", "lets the tail leak"):
            found = [train_with_accumulation(seed, make, way) for seed in range(SEEDS)]
            print(f"{kind:10}  {way:20} accuracy {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")


def train_with_accumulation(
    seed: int, make: Callable[[nn.Module], torch.optim.Optimizer], way: str, epochs: int = 10
) -> float:
    """Validation accuracy after some epochs with micro-batches of 16, four per update, as in hand-written loops.

    An epoch has 90 micro-batches, so two are left over. In the leaking variant no update applies them: their gradients
    are still present when those of the next epoch's first micro-batches are added.
    """
    model, images, labels = make_model_and_data(seed, Mlp())
    held = Mlp().dataset("val")
    optimizer = make(model)
    for epoch in range(epochs):
        order = list(SamplePermutation(len(images), seed, epoch)[:])
        for index in range(0, len(order), 16):
            part, micro = order[index : index + 16], index // 16 % ACCUMULATION
            group = order[(index // 64) * 64 :][: 16 * ACCUMULATION]
            loss = nn.functional.cross_entropy(model(images[part]), labels[part], reduction="sum")
            whole = {"forgets to divide": len(part), "lets the tail leak": 16 * ACCUMULATION}.get(way, len(group))
            (loss / whole).backward()
            ends = micro == ACCUMULATION - 1 or (way != "lets the tail leak" and index + 16 >= len(order))
            if ends:
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        return float((model(held.inputs).argmax(1) == held.targets).float().mean())


PARTS = {"direction": measure_direction, "accumulation": measure_accumulation, "classes": measure_classes}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
