"""Repeated blocks of a model: found automatically, and recomputed without a difference in results."""

from __future__ import annotations

import pytest
import torch
from launcher.recipes.gpt_model import GptModel
from launcher.recipes.resnet_model import resnet
from torch import nn

from launcher.errors import UsageError
from launcher.strategies.activation_checkpointing import apply_activation_checkpointing, find_blocks
from launcher.strategies.fsdp import check_tied_parameters


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


def test_blocks_are_the_elements_of_the_outermost_lists_that_have_parameters() -> None:
    gpt = GptModel(layers=3, heads=2, width=8, block=4, vocabulary=16, dropout=0.0)
    assert find_blocks(gpt) == list(gpt.blocks)
    net = resnet(18, 4, 1, 10, "batch", large=False)
    kinds = [type(block).__name__ for block in find_blocks(net)]
    assert kinds == ["Conv2d", "BatchNorm2d", *["Block"] * 8, "Linear"]
    assert find_blocks(nn.Linear(2, 2)) == []


def test_a_recipe_may_name_them() -> None:
    net = model()
    assert find_blocks(net, lambda model: [model[2]]) == [net[2]]
    with pytest.raises(UsageError, match=r"blocks\(model\) has Linear, which is not a submodule of the model"):
        find_blocks(net, lambda model: [nn.Linear(1, 1)])


def test_a_block_is_computed_twice_and_leaves_the_same_as_one_that_is_not() -> None:
    plain, anew = model(), model()
    apply_activation_checkpointing(find_blocks(anew))
    assert list(anew.state_dict()) == list(plain.state_dict())
    x = torch.randn(6, 8)
    for net in (plain, anew):
        torch.manual_seed(1)
        net(x).square().sum().backward()
    assert (plain[0].times, anew[0].times) == (1, 2)
    for one, other in zip(plain.parameters(), anew.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(plain.buffers(), anew.buffers(), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_computed_twice_where_nothing_is_kept() -> None:
    net = model().eval()
    apply_activation_checkpointing(find_blocks(net))
    with torch.no_grad():
        net(torch.randn(2, 8))
    assert net[0].times == 1


def test_a_parameter_of_two_blocks_is_refused_under_fsdp_for_it_would_become_two() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    check_tied_parameters(model, list(model))
    model[2].weight = model[0].weight
    check_tied_parameters(model, [model[1]])  # both tied layers are outside the blocks
    with pytest.raises(UsageError, match=r"0\.weight and 2\.weight are one parameter in two blocks"):
        check_tied_parameters(model, list(model))
    with pytest.raises(UsageError, match=r"0\.weight and 2\.weight are one parameter in two blocks"):
        check_tied_parameters(model, [model[0]])
