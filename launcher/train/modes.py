"""Training and evaluation mode of a model whose modules may have modes of their own, such as a frozen BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

__all__ = ["enter_training_mode", "evaluation_mode", "find_modules_in_eval"]


def enter_training_mode(model: nn.Module) -> None:
    """Put a new model into training mode, except for the modules that are in evaluation mode within it.

    If the whole model is in evaluation mode, as some libraries return it, all of it trains. A `train` method of a
    module's own keeps its effect.
    """
    own = get_modes(model)
    model.train()
    if any(own.values()):
        after = get_modes(model)
        set_modes(model, {module: own[module] and after[module] for module in own} | {model: model.training})


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; afterwards, each module into its mode before."""
    before = get_modes(model)
    model.eval()
    try:
        yield
    finally:
        model.train(before[model])
        set_modes(model, before)


def find_modules_in_eval(model: nn.Module) -> list[str]:
    """The names of the outermost modules that are in evaluation mode while the model is in training mode."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not module.training and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def get_modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def set_modes(model: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
    """Set each module's mode, by its `train` method where it differs: that may do more than set a flag."""
    for module in model.modules():
        if module in modes and module.training != modes[module]:
            module.train(modes[module])
    for module, training in modes.items():
        if module.training != training:
            module.training = training
