"""The configured optimizer, and its state by parameter names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.config.trusted_classes import load_class
from launcher.errors import UsageError

__all__ = [
    "ParamGroupsFn",
    "check_optimizer_class",
    "get_optimizer_facts",
    "get_optimizer_tensors",
    "load_optimizer",
    "make_optimizer",
    "set_lr_and_momentum",
    "supports_found_inf",
]

#: Key in an optimizer's parameter group: the group's learning rate relative to the schedule's.
LR_MULTIPLIER = "lr_share"
#: torch's optimizers with a fused kernel on both CPU and CUDA.
FUSED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


#: The type of a recipe's optional `param_groups(model)`.
ParamGroupsFn = Callable[[nn.Module], Iterable[dict[str, Any]]]


def make_optimizer(
    model: nn.Module, config: RunConfig, groups: ParamGroupsFn | None = None, fused: tuple[type, ...] = FUSED_OPTIMIZERS
) -> torch.optim.Optimizer:
    """Build the configured optimizer for the trainable parameters, with learning rate 0 until the schedule sets it.

    `groups` returns the recipe's parameter groups in torch's format. A group's `lr` is its learning rate at `lr.base`;
    the ratio of the two is kept through warmup, decay and batch changes. `fused`: optimizer classes whose fused kernel
    works on this model.

    Raises:
        UsageError: the class is unknown or not trusted, or refuses one of its arguments.
    """
    options = {name: value for name, value in config.optimizer.items() if name != "_target_"}
    target, trust = str(config.optimizer["_target_"]), tuple(config.recipe.get("trust", ()))
    optimizer_class = load_class(target, trust, "optimizer._target_")
    if optimizer_class in fused and options.get("fused") is None and options.get("foreach") is None:
        options["fused"] = all(p.is_floating_point() for p in model.parameters())
    try:
        optimizer = optimizer_class(
            get_recipe_param_groups(model, config, groups) or make_param_groups(model, config, options),
            lr=0.0,
            **options,
        )
    except (TypeError, ValueError) as problem:
        raise UsageError(f"optimizer={optimizer_class.__name__} does not take these arguments: {problem}") from problem
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"optimizer._target_={config.optimizer['_target_']} is not a torch.optim.Optimizer: name a subclass of it"
        )
    return optimizer


def get_recipe_param_groups(model: nn.Module, config: RunConfig, groups: ParamGroupsFn | None) -> list[dict[str, Any]]:
    """The recipe's parameter groups, each with its learning rate multiplier; empty if the recipe defines none.

    Raises:
        UsageError: a trainable parameter is in none of the groups, or in more than one.
    """
    if groups is None:
        return []
    param_groups = [dict(group) for group in groups(model)]
    for group in param_groups:
        group["params"] = list(group["params"]) if not isinstance(group["params"], torch.Tensor) else [group["params"]]
        if "lr" in group:
            group[LR_MULTIPLIER] = group.pop("lr") / float(config.lr.base or 1.0)
    grouped = Counter(id(parameter) for group in param_groups for parameter in group["params"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and grouped[id(parameter)] != 1:
            times = "more than one" if grouped[id(parameter)] else "none"
            raise UsageError(f"the recipe's param_groups(model) has {name} in {times} of its groups: put it in one")
    return param_groups


def make_param_groups(model: nn.Module, config: RunConfig, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay: parameters of fewer than two dimensions (norms, biases) get none."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not options.get("weight_decay") or config.train.decay_norms:
        return [{"params": trainable}]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step reads `found_inf` on the device, so that the host does not need to synchronise."""
    return isinstance(optimizer, FUSED_OPTIMIZERS) and bool(optimizer.param_groups[0].get("fused"))


def set_lr_and_momentum(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_MULTIPLIER, 1.0)
        if momentum is not None and "momentum" in group:
            group["momentum"] = momentum
        elif momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])


def get_names_by_group(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def get_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of the optimizer state as `<parameter>/<slot>`."""
    return {
        f"{name}/{slot}": value
        for name, slot, value in _iter_slots(optimizer, model)
        if isinstance(value, torch.Tensor)
    }


def get_optimizer_facts(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer state that is not a tensor, and the parameter names of each group, as JSON values."""
    numbers = {
        f"{name}/{slot}": value
        for name, slot, value in _iter_slots(optimizer, model)
        if not isinstance(value, torch.Tensor) and value is not None
    }
    return {"kind": type(optimizer).__name__, "numbers": numbers, "groups": get_names_by_group(optimizer, model)}


def _iter_slots(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            yield name, slot, value


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Load a checkpoint's optimizer state. The groups' options stay those of the current configuration.

    Raises:
        UsageError: the state was written by a different optimizer class.
    """
    check_optimizer_class(optimizer, facts)
    state: dict[str, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *facts["numbers"].items()):
        name, slot = key.rsplit("/", 1)
        state.setdefault(name, {})[slot] = value
    order = [name for group in get_names_by_group(optimizer, model) for name in group]
    state_dict = optimizer.state_dict()
    state_dict["state"] = {index: state[name] for index, name in enumerate(order) if name in state}
    optimizer.load_state_dict(state_dict)


def check_optimizer_class(optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> None:
    """Check that the checkpoint's optimizer state fits this optimizer.

    Raises:
        UsageError: the state was written by a different optimizer class.
    """
    if facts["kind"] != type(optimizer).__name__:
        raise UsageError(
            f"optimizer={type(optimizer).__name__} cannot load the checkpoint's state of {facts['kind']}: "
            f"continue with {facts['kind']}, or start a new run with run.name=… or resume=never"
        )
