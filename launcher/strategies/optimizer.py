"""The configured optimizer: its parameter groups, learning rate and steps."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.config.trusted_classes import load_class
from launcher.errors import UsageError

__all__ = [
    "ParamGroupsFn",
    "drop_gradients",
    "make_optimizer",
    "set_lr_and_momentum",
    "supports_found_inf",
    "take_optimizer_step",
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

    It is made with `lr.base`, since some optimizers refuse a rate of 0. `groups` returns the recipe's parameter groups
    in torch's format. A group's `lr` is its learning rate at `lr.base`; the ratio of the two is kept through warmup,
    decay and batch changes. `fused`: optimizer classes whose fused kernel works on this model.

    Raises:
        UsageError: the class is unknown or not trusted, refuses one of its arguments, or is of a kind that the training
            loop cannot run.
    """
    options = {name: value for name, value in config.optimizer.items() if name != "_target_"}
    target, trust = str(config.optimizer["_target_"]), tuple(config.recipe.get("trust", ()))
    optimizer_class = load_class(target, trust, "optimizer._target_")
    check_optimizer_methods(optimizer_class)
    if optimizer_class in fused and options.get("fused") is None and options.get("foreach") is None:
        # The fused SGD cannot start one momentum after the others, unless that is the same as to start it from zeros.
        late_start = optimizer_class is not torch.optim.SGD or not options.get("dampening")
        options["fused"] = late_start and all(p.is_floating_point() for p in model.parameters())
    param_groups = get_recipe_param_groups(model, config, groups) or make_param_groups(model, config, options)
    try:
        optimizer = optimizer_class(param_groups, lr=float(config.lr.base or 1.0), **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as problem:
        why = str(problem) or f"{type(problem).__name__} in its __init__"
        if "'lr'" in why:
            why += ". The launcher sets the learning rate of every update, so an optimizer without lr= cannot be used"
        raise UsageError(f"optimizer={optimizer_class.__name__} does not take these arguments: {why}") from problem
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"optimizer._target_={config.optimizer['_target_']} is not a torch.optim.Optimizer: name a subclass of it"
        )
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def check_optimizer_methods(optimizer_class: type) -> None:
    """Check that the training loop can run an optimizer of this class.

    Raises:
        UsageError: its step needs a closure, or it switches the parameters between training and validation.
    """
    name = optimizer_class.__name__
    step = getattr(optimizer_class, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step is not None else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"optimizer={name} needs a closure that computes the loss again within a step, which is not supported: "
            "type optimizer=sgd, optimizer=adamw or another optimizer whose step() takes no argument"
        )
    if callable(getattr(optimizer_class, "eval", None)) and callable(getattr(optimizer_class, "train", None)):
        raise UsageError(
            f"optimizer={name} has train() and eval(), which exchange the parameters for validation and saving; that "
            "is not supported: type optimizer=adamw or another optimizer without them"
        )


def get_recipe_param_groups(model: nn.Module, config: RunConfig, groups: ParamGroupsFn | None) -> list[dict[str, Any]]:
    """The recipe's parameter groups, each with its learning rate multiplier; empty if the recipe defines none.

    Raises:
        UsageError: a group is not one in torch's format, or has a tensor that is not a parameter of the model; or a
            trainable parameter is in none of the groups, or in more than one.
    """
    if groups is None:
        return []
    param_groups = [read_param_group(group) for group in groups(model)]
    own = {id(parameter) for parameter in model.parameters()}
    for group in param_groups:
        if "lr" in group:
            group[LR_MULTIPLIER] = group.pop("lr") / float(config.lr.base or 1.0)
        if foreign := [parameter for parameter in group["params"] if id(parameter) not in own]:
            what = f"a tensor of the shape {list(getattr(foreign[0], 'shape', []))}"
            raise UsageError(
                f"the recipe's param_groups(model) has {what} that is not a parameter of the model, so it would be "
                "neither synchronised nor saved: make it an nn.Parameter of the module that model() returns"
            )
    grouped = Counter(id(parameter) for group in param_groups for parameter in group["params"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and grouped[id(parameter)] != 1:
            times = "more than one" if grouped[id(parameter)] else "none"
            raise UsageError(f"the recipe's param_groups(model) has {name} in {times} of its groups: put it in one")
    for group in param_groups:  # what is frozen stays so: its gradients would not be summed over the ranks
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return param_groups


def read_param_group(group: Any) -> dict[str, Any]:
    """A copy of a parameter group, its `params` as a list of tensors; they may have names, as torch allows.

    Raises:
        UsageError: it is not a mapping with `params`, or these are a set, whose order differs between processes.
    """
    if not isinstance(group, Mapping) or "params" not in group or isinstance(group["params"], set | frozenset):
        kind = "a set as params" if isinstance(group, Mapping) and "params" in group else f"a {type(group).__name__}"
        raise UsageError(
            f"the recipe's param_groups(model) has {kind} among its groups: return dicts with a list of parameters, "
            'e.g. [{"params": [model.weight], "lr": 0.1}]'
        )
    params = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    return {**group, "params": [item[1] if isinstance(item, tuple) else item for item in params]}


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


def take_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Step; first give zeros to parameters whose first gradient comes later than that of others, under the fused SGD.

    Its kernel takes momentum buffers for all parameters or for none. From zeros, the first step without dampening is
    that of torch's other kernels, which start from the gradient.

    Raises:
        UsageError: there is dampening, with which it is not.
    """
    if isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0].get("fused"):
        known = len(optimizer.state)
        if 0 < known < sum(len(group["params"]) for group in optimizer.param_groups):
            for group in optimizer.param_groups:
                start_late_momentum(group, optimizer.state)
    with torch.set_grad_enabled(False):  # as no_grad(), in less time
        optimizer.step()


def start_late_momentum(group: Mapping[str, Any], state: Mapping[torch.Tensor, dict[str, Any]]) -> None:
    """Give zero momentum to the parameters of a group that have their first gradient in this step."""
    stepped = [p for p in group["params"] if p.grad is not None] if group["momentum"] else []
    late = [p for p in stepped if state[p].get("momentum_buffer") is None]
    if group["dampening"]:
        if 0 < len(late) < len(stepped):
            raise UsageError(
                f"optimizer.dampening={group['dampening']} with optimizer.fused=true: some parameters have their first "
                "gradient later than others, which the fused SGD cannot represent: leave optimizer.fused out"
            )
        return
    for parameter in late:
        state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Set all gradients to None. torch's own `zero_grad` would take several times as long, for a profiler's record."""
    if getattr(optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        with torch.no_grad():  # it may change parameters
            optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def set_lr_and_momentum(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_MULTIPLIER, 1.0)
        if momentum is not None and "momentum" in group:
            group["momentum"] = momentum
        elif momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
