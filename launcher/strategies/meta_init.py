"""Build the model on the meta device on ranks that receive rank 0's values, so that only rank 0 holds all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.strategies.interface import LARGE_MODEL_BYTES

__all__ = ["build_on_meta_device", "materialize"]


def build_on_meta_device(recipe: Any, config: RunConfig, rank: int) -> nn.Module | None:
    """Build the recipe's model on torch's meta device; None if this rank must build the model normally.

    `strategy.meta_init=auto` uses the meta device if the parameters exceed 4 GiB, and falls back to a normal build if
    the model cannot be built on it.

    Raises:
        UsageError: `strategy.meta_init=true`, and the model cannot be built on the meta device.
    """
    if rank == 0 or config.strategy.name != "fsdp" or config.strategy.meta_init is False:
        return None
    try:
        with torch.device("meta"):
            model: nn.Module = recipe.model()
        reason = next(find_unregistered_tensors(model), None)
    except Exception as error:  # a recipe may read values, which meta tensors do not have, and raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    required = config.strategy.meta_init is True
    if reason is None:
        return model if required or sum(p.nbytes for p in model.parameters()) > LARGE_MODEL_BYTES else None
    if required:
        raise UsageError(
            f"strategy.meta_init=true: the recipe's model cannot be built on the meta device ({reason}): "
            "type strategy.meta_init=false, which builds the whole model on every worker"
        )
    logging.getLogger("launcher").info("every worker builds the whole model: %s", reason)
    return None


def find_unregistered_tensors(model: nn.Module) -> Iterator[str]:
    """Find meta tensors that modules keep as plain attributes: they would never receive rank 0's values."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            if attribute not in ("_parameters", "_buffers") and any(map(_is_meta, values)):
                yield f"{f'{name}.' if name else ''}{attribute} is neither a parameter nor a buffer"


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def materialize(model: nn.Module) -> None:
    """Replace the meta tensors of `model` with uninitialised CPU tensors. Tied tensors stay tied."""
    replacements: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in replacements:
                    replacements[tensor] = make_empty_on_cpu(tensor)
                group[name] = replacements[tensor]  # type: ignore[assignment]


def make_empty_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, tensor.requires_grad)
    vars(empty).update(vars(tensor))  # attributes that the recipe set on it, e.g. to select its parameter group
    return empty
