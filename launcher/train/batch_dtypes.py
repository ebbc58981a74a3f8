"""Explain a loss that fails because the batch and the model have different floating-point types."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from launcher.errors import UsageError

__all__ = ["explain_dtype_mismatch", "iter_tensors"]

#: How torch words that two tensors of an operation differ in their type.
MISMATCH = re.compile(r"dtype|scalar type|same type|\btype \(|different types|but found", re.IGNORECASE)


def explain_dtype_mismatch(error: Exception, model: nn.Module, batch: Any) -> None:
    """Called with the error of a loss.

    Raises:
        UsageError: instead of torch's error, if tensors of the batch have another type than the model's parameters.
    """
    is_mismatch = MISMATCH.search(str(error)) and not isinstance(error, UsageError)
    problem = describe_mismatch(model, batch) if is_mismatch else None
    if problem is not None:
        raise UsageError(f"loss() fails with {' '.join(str(error).split())[:120]!r}: {problem}") from error


def describe_mismatch(model: nn.Module, batch: Any) -> str | None:
    """What differs, and what to do; None if all floating-point tensors of the batch have the type of a parameter."""
    parameters = [(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()]
    own = {dtype for _, dtype in parameters}
    floats = [(place, tensor.dtype) for place, tensor in iter_tensors(batch) if tensor.is_floating_point()]
    others = [(place, dtype) for place, dtype in floats if dtype not in own]
    if not own or not others:
        return None
    dtype, (name, parameter_dtype) = others[0][1], parameters[0]
    places = ", ".join(place for place, each in others[:3] if each == dtype)
    batch_dtype, model_dtype = (str(each).removeprefix("torch.") for each in (dtype, parameter_dtype))
    if parameter_dtype in (torch.float16, torch.bfloat16):
        short = "fp16" if parameter_dtype is torch.float16 else "bf16"
        fix = f"build the model in float32 and type train.precision={short}"
    else:
        more = ", or type train.precision=fp64" if dtype is torch.float64 else ""
        fix = f"return {model_dtype} from the dataset, e.g. with .to(torch.{model_dtype}){more}"
    return f"{places} is {batch_dtype} and the model's parameters are {model_dtype} (e.g. {name}): {fix}"


def iter_tensors(batch: Any, place: str = "batch") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a batch, each with its place in it."""
    if isinstance(batch, torch.Tensor):
        yield place, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from iter_tensors(value, f"{place}[{key!r}]")
    elif isinstance(batch, list | tuple):
        names = getattr(batch, "_fields", None)
        for index, value in enumerate(batch):
            yield from iter_tensors(value, f"{place}.{names[index]}" if names else f"{place}[{index}]")
    elif is_dataclass(batch) and not isinstance(batch, type):
        for each in fields(batch):
            yield from iter_tensors(getattr(batch, each.name), f"{place}.{each.name}")
