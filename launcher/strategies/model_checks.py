"""Refuse models that cannot be trained as they are, before training, naming the module and what to use instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.strategies.extra_state import collect_extra_state, split_extra_state

__all__ = ["check_is_built", "check_model"]


def check_is_built(model: Any) -> None:
    """Check that what a recipe's `model()` returned is a module whose parameters have values.

    Raises:
        UsageError: it is not a module, or a lazy one.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the recipe's model() returns a {type(model).__name__}: return a torch.nn.Module")
    for path, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            name = type(module).__name__
            raise UsageError(
                f"the model's {path or 'outermost module'} is a {name} that has no shape before it sees data, so it "
                f"cannot be planned, synchronised or saved: use {name.replace('Lazy', '')} with its sizes, or call the "
                "model once on data of the right shape in model()"
            )


def check_model(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Check that the training loop and the strategy can train a model.

    Raises:
        UsageError: names the first module or parameter that they cannot, and what to use instead.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "the model has no trainable parameter: set requires_grad of the parameters to train in model()"
        )
    collect_extra_state(split_extra_state(model.state_dict())[1])
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UsageError(
                f"the model's {name} is {str(parameter.dtype).removeprefix('torch.')}: complex parameters are not "
                "supported: keep a float parameter and use torch.view_as_complex in forward()"
            )
        if parameter.requires_grad:
            check_parameter_hooks(name, parameter, config)
            refuse_sparse_gradient(name, parameter)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise UsageError(
                f"the model's {path or type(module).__name__} has sparse=True: sparse gradients are not supported: "
                "leave sparse=True out"
            )
        if isinstance(module, nn.SyncBatchNorm):
            check_sync_batchnorm(path, config, device)
    if config.strategy.name == "deepspeed":
        check_deepspeed_parameters(model)


def check_parameter_hooks(name: str, parameter: nn.Parameter, config: RunConfig) -> None:
    """Check that the strategy runs the hooks that model() registered on a parameter.

    Raises:
        UsageError: it does not, or they see gradients before these are summed over micro-batches and ranks.
    """
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise UsageError(
            f"{name} has a hook after its gradient is accumulated (such as an optimizer step in the backward pass), "
            "which would run before the sum over micro-batches and workers: leave "
            "register_post_accumulate_grad_hook out"
        )
    if parameter._backward_hooks and config.strategy.name != "ddp":
        raise UsageError(
            f"strategy={config.strategy.name} replaces {name}, whose gradient hook would be lost: leave "
            "register_hook out, or type strategy=ddp"
        )


def refuse_sparse_gradient(name: str, parameter: nn.Parameter) -> None:
    """Check the parameter's first gradient, in the backward pass: functions may return a sparse one for any parameter.

    Raises:
        UsageError: in that backward pass, before any step, if the gradient is sparse.
    """

    def check(gradient: torch.Tensor | None) -> None:
        if gradient is None:  # of a micro-batch that contributes nothing
            return
        handle.remove()
        if gradient.layout != torch.strided:
            raise UsageError(
                f"the gradient of {name} is sparse: sparse gradients are not supported: leave sparse=True out, e.g. "
                "of torch.nn.functional.embedding"
            )

    handle = parameter.register_hook(check)


def check_sync_batchnorm(path: str, config: RunConfig, device: torch.device) -> None:
    """SyncBatchNorm communicates in the forward pass, on GPUs only.

    Raises:
        UsageError: training is on the CPU, or exact.
    """
    if device.type == "cpu":
        raise UsageError(
            f"the model's {path} is a SyncBatchNorm, which torch supports on GPUs only, and training is on the CPU: "
            "leave convert_sync_batchnorm out, or use GroupNorm or LayerNorm"
        )
    if config.elastic.exact:
        raise UsageError(
            f"elastic.exact=true: the model's {path} is a SyncBatchNorm, whose sums depend on the number of workers: "
            "leave convert_sync_batchnorm out, or type elastic.exact=false"
        )


def check_deepspeed_parameters(model: nn.Module) -> None:
    """DeepSpeed's parameters are fp32 and contiguous.

    Raises:
        UsageError: names the first other one.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(
                f"strategy=deepspeed trains float32 parameters and {name} is {dtype}: build the model in float32 and "
                "choose train.precision, or type strategy=ddp"
            )
        if not parameter.is_contiguous():
            raise UsageError(
                f"strategy=deepspeed: {name} is not contiguous in memory, as with channels_last, and cannot be "
                "partitioned: make it contiguous in model(), or type strategy=ddp"
            )
