"""`launcher verify`: for any recipe, a split batch gives the full gradient, or the responsible layer is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import main
from launcher.train.verify import VerifyResult, format_verify_result

RECIPES = '''\
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from launcher.recipe import Loss


class Functional(nn.Module):
    """Statistics of the batch without a layer of torch's: only its outputs tell."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        x = self.inner(x)
        return x - x.mean(0)


class Residual(nn.Module):
    """Adds in place, to what a layer returned."""

    def __init__(self):
        super().__init__()
        self.inner, self.act = nn.Linear(8, 8), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.inner(x)
        y += x
        return self.act(y)


class Pair(nn.Module):
    """Returns a tuple, of which one part depends on the whole batch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        x = self.inner(x)
        return x, x - x.mean(0)


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(sum(self.pair(x)))


LAYERS = {
    "plain": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4)),
    "normed": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4)),
    "dropped": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)),
    "in_place": lambda: nn.Sequential(Residual(), nn.BatchNorm1d(8), Residual(), nn.Linear(8, 4)),
    "synced": lambda: nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(8), nn.Linear(8, 4)),
    "frozen": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 4)),
    "paired": Paired,
    "functional": lambda: nn.Sequential(nn.Linear(8, 8), Functional(), nn.Linear(8, 4)),
}


@dataclass(frozen=True)
class Own:
    layers: str = "plain"
    kind: str = "sum"
    samples: int = 40

    def model(self):
        return LAYERS[self.layers]()

    def size(self, split):
        return self.samples

    def dataset(self, split):
        draw = torch.Generator().manual_seed(0)
        features = torch.randn(self.samples, 8, generator=draw)
        return torch.utils.data.TensorDataset(features, torch.arange(self.samples) % 4)

    def loss(self, model, batch):
        features, labels = batch
        scores = model(features)
        if self.kind == "mean":
            return Loss(F.cross_entropy(scores, labels), len(labels))
        if self.kind == "tokens":
            weights = 1 + labels
            return Loss((F.cross_entropy(scores, labels, reduction="none") * weights).sum(), weights.sum())
        if self.kind == "pairs":
            return Loss(F.cross_entropy(scores @ scores.T, torch.arange(len(labels)), reduction="sum"), len(labels))
        return Loss(F.cross_entropy(scores, labels, reduction="sum"), len(labels))
'''

Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Run with format=json on the user's own recipe; return the document and the exit status."""
    (tmp_path / "verify_own.py").write_text(RECIPES)
    (tmp_path / "here").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delitem(sys.modules, "verify_own", raising=False)
    own = ["recipe=own", "recipe._target_=verify_own.Own", "recipe.trust=[verify_own]"]

    def ask(*args: str) -> tuple[int, dict[str, Any]]:
        status = main(["verify", *own, *args, "format=json"])
        assert list((tmp_path / "here").iterdir()) == []
        out = capsys.readouterr().out
        return status, json.loads(out) if out else {}

    return ask


@pytest.mark.parametrize("kind", ["sum", "tokens"])
def test_summed_loss_splits_exactly(verify: Verify, kind: str) -> None:
    status, document = verify(f"+recipe.kind={kind}")
    assert status == 0
    assert (document["equal"], document["dtype"], document["breakers"]) == (True, "float64", [])
    assert document["relative"] < 1e-14
    assert 0 <= document["max_abs_diff"] < 1e-14


def test_splits_are_even_and_uneven_plans(verify: Verify) -> None:
    _, document = verify()
    shares = [split["shares"] for split in document["splits"]]
    assert all(sum(each) == document["samples"] == 32 for each in shares)
    assert [11, 11, 10] in shares
    assert {split["accumulation"] for split in document["splits"]} == {1, 2, 3, 4}


def test_only_batchnorm_layers_are_named(verify: Verify) -> None:
    status, document = verify("+recipe.layers=normed")
    assert status == 0  # a result with an explanation
    assert document["equal"] is False
    assert document["breakers"] == ["1 (BatchNorm1d)", "3 (BatchNorm1d)"]
    assert document["relative"] > 1e-3


def test_dropout_is_named(verify: Verify) -> None:
    assert verify("+recipe.layers=dropped")[1]["breakers"] == ["1 (Dropout)"]


def test_custom_layer_mixing_samples_is_named(verify: Verify) -> None:
    assert verify("+recipe.layers=functional")[1]["breakers"] == ["1 (Functional)"]


def test_layers_whose_output_is_changed_in_place_are_not_named(verify: Verify) -> None:
    assert verify("+recipe.layers=in_place")[1]["breakers"] == ["1 (BatchNorm1d)"]


def test_layer_that_returns_several_tensors_is_named_alone(verify: Verify) -> None:
    assert verify("+recipe.layers=paired")[1]["breakers"] == ["pair (Pair)"]


def test_frozen_batchnorm_splits_exactly(verify: Verify) -> None:
    assert verify("+recipe.layers=frozen")[1]["equal"] is True


def test_advice_for_synchronised_batchnorm_is_not_to_use_it(verify: Verify) -> None:
    breakers = verify("+recipe.layers=synced")[1]["breakers"]
    assert breakers == ["1 (SyncBatchNorm)"]
    text = format_verify_result(VerifyResult(1.0, 1.0, 32, (), tuple(breakers)))
    assert "batch.accumulation=1" in text
    assert "torch.nn.SyncBatchNorm" not in text
    assert "torch.nn.SyncBatchNorm" in format_verify_result(VerifyResult(1.0, 1.0, 32, (), ("1 (BatchNorm1d)",)))


@pytest.mark.parametrize("kind", ["mean", "pairs"])
def test_loss_that_is_not_a_sum_is_named(verify: Verify, kind: str) -> None:
    status, document = verify(f"recipe.kind={kind}")
    assert status == 1  # layers may do so on purpose; a mean loss gives wrong gradients
    assert (document["equal"], document["breakers"]) == (False, ["loss"])


def test_small_dataset_is_split_into_fewer_parts(verify: Verify) -> None:
    _, document = verify("+recipe.samples=5", "batch.per_device=5")
    assert document["equal"] is True
    assert [split["shares"] for split in document["splits"]] == [[5], [3, 2]]


def test_single_sample_is_refused(verify: Verify, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = verify("+recipe.samples=1", "batch.per_device=1")
    assert status == 2


@pytest.mark.parametrize(
    ("recipe", "message"), [("mlp", "The same gradient"), ("resnet", "(BatchNorm2d)"), ("gpt", "The same gradient")]
)
def test_shipped_recipes_verify(
    recipe: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", f"recipe={recipe}"]) == 0
    out = capsys.readouterr().out
    assert message in out
    assert max(map(len, out.splitlines())) <= 80
