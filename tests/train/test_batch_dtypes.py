"""A loss that fails on the types of batch and model says which tensors differ, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from launcher.errors import UsageError
from launcher.train.batch_dtypes import explain_dtype_mismatch

X, Y = torch.ones(4, 3), torch.ones(4, 1)


def compute_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    try:
        return mse_loss(model(batch["x"]), batch["y"][0], reduction="sum")
    except (RuntimeError, ValueError) as error:
        explain_dtype_mismatch(error, model, batch)
        raise


@pytest.mark.parametrize(
    ("model", "batch", "named"),
    [
        (
            nn.Linear(3, 1),
            {"x": X.double(), "y": [Y.double()]},
            r"batch\['x'\], batch\['y'\]\[0\] is float64 and the model's parameters are float32 \(e\.g\. weight\): "
            r"return float32 .* or type train\.precision=fp64",
        ),
        (
            nn.Linear(3, 1).bfloat16(),
            {"x": X, "y": [Y]},
            r"is float32 and the model's parameters are bfloat16 .*build the model in float32 and type "
            r"train\.precision=bf16",
        ),
        (nn.Conv1d(4, 2, 1), {"x": X.double(), "y": [Y]}, r"batch\['x'\] is float64"),
        (nn.LSTM(3, 2), {"x": X.double(), "y": [Y]}, r"batch\['x'\] is float64"),
        (nn.Bilinear(3, 3, 1), {"x": X.double(), "y": [Y]}, r"batch\['x'\] is float64"),
    ],
)
def test_types_that_differ_are_named(model: nn.Module, batch: Any, named: str) -> None:
    if isinstance(model, nn.Bilinear):
        bilinear = model.forward
        model.forward = lambda x: bilinear(x, x)  # type: ignore[method-assign, assignment]
    with pytest.raises(UsageError, match=named):
        compute_loss(model, batch)


def test_types_that_torch_promotes_and_other_errors_are_left_alone() -> None:
    model = nn.Linear(3, 1)
    assert compute_loss(model, {"x": X, "y": [Y.double()]}).dtype == torch.float64
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        compute_loss(model, {"x": X.T, "y": [Y.double()]})
    assert not isinstance(raised.value, UsageError)
