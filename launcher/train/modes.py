"""Training and evaluation mode of a model whose modules may have modes of their own, such as a frozen BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["describe_untrained_modes", "enter_training_mode", "evaluation_mode", "find_modules_in_eval"]


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


def find_trained_in_eval(model: nn.Module) -> list[str]:
    """The outermost modules in evaluation mode that are trained, and have parts that differ in training mode.

    A single BatchNorm or Dropout in evaluation mode is not among them: that is set on purpose.
    """
    return [
        name
        for name in find_modules_in_eval(model)
        if not is_mode_sensitive(module := model.get_submodule(name))
        and any(parameter.requires_grad for parameter in module.parameters())
        and any(is_mode_sensitive(part) and not part.training for part in module.modules())
    ]


def is_mode_sensitive(module: nn.Module) -> bool:
    """Whether the module drops at random, or normalises by a batch's statistics, in training mode only."""
    if isinstance(module, _NormBase):
        return module.track_running_stats
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    if "drop" not in type(module).__name__.lower():
        return False
    return any(getattr(module, name, 0) for name in ("p", "drop_prob"))


def describe_untrained_modes(model: nn.Module) -> str | None:
    """Say which modules are trained in evaluation mode though training mode would differ; None if there are none."""
    names = find_trained_in_eval(model)
    if not names:
        return None
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    is_one = len(names) == 1
    return (
        f"{', '.join(names[:3])}{others} {'is' if is_one else 'are'} trained in eval mode, as model() returned "
        f"{'it' if is_one else 'them'}: without dropout, and with running statistics that stay as they are. Call "
        "model.train() in model() of the recipe, as libraries may return a loaded model in eval mode; or freeze "
        "its parameters with requires_grad_(False); or put only its BatchNorm or Dropout layers into eval mode"
    )


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
