"""What FSDP2 cannot shard, or would train wrongly: refused by name, before training or before a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from launcher.errors import UsageError

__all__ = [
    "check_parameter_shapes",
    "check_sharded_state",
    "check_tied_parameters",
    "check_uniform_dtypes",
    "refuse_gathered",
]


def check_sharded_state(kind: str, tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Check that the optimizer's state consists of shards like those of its parameter, and of single values.

    Other tensors may be computed from the rows of one rank, and only rank 0's would be saved.

    Raises:
        UsageError: names the first other tensor.
    """
    for key, tensor in tensors.items():
        parameter = parameters.get(key.rpartition("/")[0])
        if isinstance(tensor, DTensor) and isinstance(parameter, DTensor) and is_sharded_like(tensor, parameter):
            continue
        if (
            isinstance(tensor, DTensor)
            or tensor.numel() > 1
            or (parameter is not None and tensor.shape == parameter.shape)
        ):
            raise UsageError(
                f"strategy=fsdp: optimizer={kind} keeps {key}, a {type(tensor).__name__} of the shape "
                f"{list(tensor.shape)}, and a checkpoint holds only tensors that are sharded as their parameter is and "
                "single values that are the same on all workers: type strategy=ddp"
            )


def is_sharded_like(tensor: DTensor, parameter: DTensor) -> bool:
    return (tensor.shape, tensor.placements) == (parameter.shape, parameter.placements)


def check_parameter_shapes(model: nn.Module) -> None:
    """Check that every parameter can be sharded by rows.

    Raises:
        UsageError: a parameter is a scalar, which has no rows, or not contiguous, as with channels_last.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UsageError(
                f"strategy=fsdp: {name} is a scalar, which cannot be sharded by rows: give it the shape (1,), "
                "or type strategy=ddp"
            )
        if not parameter.is_contiguous():
            raise UsageError(
                f"strategy=fsdp: {name} is not contiguous in memory, as with channels_last, and cannot be sharded by "
                "rows: make it contiguous in model(), or type strategy=ddp"
            )


def check_tied_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Check that no tied parameter crosses a block boundary.

    Raises:
        UsageError: a parameter is shared by two blocks, or by a block and the rest: torch would shard it twice and
            train two independent parameters.
    """
    block_of = {module: number for number, block in enumerate(blocks) for module in block.modules()}
    first_uses: dict[nn.Parameter, tuple[int | None, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = block_of.get(model.get_submodule(name.rpartition(".")[0]))
        first_block, first_name = first_uses.setdefault(parameter, (block, name))
        if block != first_block:
            raise UsageError(
                f"strategy=fsdp: {first_name} and {name} are one parameter in two blocks, which FSDP2 would train as "
                "two: exclude the modules that hold it from the recipe's blocks(model), or type strategy=ddp"
            )


def check_uniform_dtypes(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Check that the trained parameters that are gathered together have one dtype; frozen ones may have others.

    Raises:
        UsageError: those of a block, or those outside of all blocks, have several.
    """
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in in_blocks]
    names = {parameter: name for name, parameter in model.named_parameters()}
    for unit in (*(list(block.parameters()) for block in blocks), rest):
        first = {parameter.dtype: parameter for parameter in reversed(unit) if parameter.requires_grad}
        if len(first) > 1:
            kinds = ", ".join(f"{names[p]} is {str(dtype).removeprefix('torch.')}" for dtype, p in first.items())
            raise UsageError(
                f"strategy=fsdp gathers trained parameters of one type together, and {kinds}: build the model in "
                "float32, or type strategy=ddp"
            )


def refuse_gathered(gathered: Mapping[str, torch.Tensor]) -> None:
    """After an update's last backward pass, no gathered parameter has a gradient: the sums are in the sharded ones.

    Raises:
        UsageError: one has, as the backward pass has run a block several times: that was not summed over the workers.
    """
    for name, parameter in gathered.items():
        if parameter.grad is not None:
            raise UsageError(
                f"strategy=fsdp: the gradient of {name} was not summed over the workers, as happens with reentrant "
                "checkpoints of a block that is used twice: no step was taken; checkpoint with use_reentrant=False"
            )
