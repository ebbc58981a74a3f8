"""Repeated blocks of a model: found automatically, and recomputed without a difference in results."""

from __future__ import annotations

import pytest
import torch
from launcher.recipes.gpt_model import GptModel
from launcher.recipes.resnet_model import resnet
from torch import nn

from launcher.errors import UsageError
from launcher.strategies.activation_checkpointing import apply_activation_checkpointing, find_blocks
from launcher.strategies.fsdp_checks import check_tied_parameters


class Counted(nn.Module):
    """A norm, dropout and a linear layer; counts its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.drop = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.times = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return self.drop(torch.relu(self.layer(self.norm(x))))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Counted(), nn.ReLU(), Counted())


def test_blocks_are_elements_of_outermost_lists() -> None:
    gpt = GptModel(layers=3, heads=2, width=8, block=4, vocabulary=16, dropout=0.0)
    assert find_blocks(gpt) == list(gpt.blocks)
    net = resnet(18, 4, 1, 10, "batch", large=False)
    kinds = [type(block).__name__ for block in find_blocks(net)]
    assert kinds == ["Conv2d", "BatchNorm2d", *["Block"] * 8, "Linear"]
    assert find_blocks(nn.Linear(2, 2)) == []


def test_recipe_may_define_blocks() -> None:
    net = model()
    assert find_blocks(net, lambda model: [model[2]]) == [net[2]]
    with pytest.raises(UsageError, match=r"blocks\(model\) has Linear, which is not a submodule of the model"):
        find_blocks(net, lambda model: [nn.Linear(1, 1)])


def test_recomputed_block_gives_same_results() -> None:
    plain, recomputed = model(), model()
    apply_activation_checkpointing(find_blocks(recomputed))
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    x = torch.randn(6, 8)
    for net in (plain, recomputed):
        torch.manual_seed(1)
        net(x).square().sum().backward()
    assert (plain[0].times, recomputed[0].times) == (1, 2)
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(plain.buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("with_buffers", [True, False])
def test_recomputed_blocks_of_a_compiled_model_give_same_results(with_buffers: bool) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return (
            nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
            if not with_buffers
            else model()
        )

    plain, compiled = build(), build()
    apply_activation_checkpointing(find_blocks(compiled))
    torch.compiler.reset()
    compiled.compile(backend="aot_eager")
    x = torch.randn(6, 8)
    for _ in range(2):
        for net in (plain, compiled):
            torch.manual_seed(1)
            net(x).square().sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(plain.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_no_recomputation_without_gradients() -> None:
    net = model().eval()
    apply_activation_checkpointing(find_blocks(net))
    with torch.no_grad():
        net(torch.randn(2, 8))
    assert net[0].times == 1


def test_parameter_tied_across_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    check_tied_parameters(model, list(model))
    model[2].weight = model[0].weight
    check_tied_parameters(model, [model[1]])  # both tied layers are outside the blocks
    with pytest.raises(UsageError, match=r"0\.weight and 2\.weight are one parameter in two blocks"):
        check_tied_parameters(model, list(model))
    with pytest.raises(UsageError, match=r"0\.weight and 2\.weight are one parameter in two blocks"):
        check_tied_parameters(model, [model[0]])
