"""Names, shapes and dtypes of a model's tensors, compared with those of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.tensor_io import is_of_model
from launcher.errors import UsageError

__all__ = ["check_tensor_names", "dtype_and_shape"]


def check_tensor_names(manifest: Manifest, expected: Mapping[str, torch.Tensor]) -> None:
    """Check that a checkpoint has exactly the names, shapes and dtypes of the new model's `state_dict()`.

    Buffers that training changed are compared as they were in the new model of the checkpoint's own run.

    Raises:
        UsageError: the checkpoint belongs to a different model; the first five differences are listed.
    """
    saved = {
        alias: dtype_and_shape(facts["dtype"], facts["shape"])
        for name, facts in manifest.tensors.items()
        if is_of_model(facts)
        for alias in (name, *facts["aliases"])
    }
    initial_buffers: Mapping[str, str | None] = manifest.facts.get("buffers", {})
    saved = {name: kind for name, kind in saved.items() if name not in initial_buffers} | {
        name: kind for name, kind in initial_buffers.items() if kind is not None
    }
    present = {name: dtype_and_shape(tensor.dtype, tensor.shape) for name, tensor in expected.items()}
    if differences := list(state_dict_differences(saved, present)):
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UsageError(
            f"the checkpoint belongs to a different model: {'; '.join(differences[:5])}{more}: "
            f"use the recipe it was trained with, or start a new run with run.name=... or resume=never"
        )


def dtype_and_shape(dtype: object, shape: Any) -> str:
    """For example `float32[3, 4]`."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def state_dict_differences(saved: Mapping[str, str], present: Mapping[str, str]) -> Iterator[str]:
    for name, kind in present.items():
        if name not in saved:
            yield f"{name} is not in the checkpoint"
        elif saved[name] != kind:
            yield f"{name} is {saved[name]} in the checkpoint, not {kind}"
    yield from (f"{name} is only in the checkpoint" for name in saved if name not in present)
