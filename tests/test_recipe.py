"""Recipes: the target class, the values that its fields accept, and the sizes of its data."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import ChainDataset, DataLoader, Dataset, IterableDataset

from launcher.cli.main import main
from launcher.errors import EXIT_USAGE, UsageError
from launcher.plan.training_plan import DatasetSizes
from launcher.recipe import Loss, build_recipe, find_unlearned_defaults, get_dataset_sizes
from launcher.train.data import get_dataset

RECIPE_MODULE = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any, Literal

@dataclass(frozen=True)
class Mine:
    width: int = 64
    rate: float = 0.5
    deep: bool = False
    name: str = "x"
    norm: Literal["batch", "group"] = "batch"
    size: int | tuple[int, int] | None = None
    stages: tuple[int, ...] = (1, 2)
    names: list[str] | None = None
    options: dict[str, int] | None = None
    extra: Any = None
    data: str = field(default="/data", metadata={"learned": False})
    cache: str | None = field(default=None, metadata={"learned": False})
    mirror: str = field(default="https://me:secret@host/data", metadata={"learned": False})
    options_of_loader: dict = field(default_factory=dict, metadata={"learned": False})
    seen: str = field(default="x", metadata={"learned": True})

    def model(self): ...
    def dataset(self, split): return [1, 2, 3] if split == "train" else [1]
    def loss(self, model, batch): ...

@dataclass
class Asks:
    where: str
    def model(self): ...
    def dataset(self, split): ...
    def loss(self, model, batch): ...

@dataclass
class NoLoss:
    def model(self): ...
    def dataset(self, split): ...

class Plain:
    def model(self): ...
    def dataset(self, split): ...
    def loss(self, model, batch): ...

def function(): ...
"""
SPEC = {"_target_": "my_own.Mine", "trust": ["my_own"]}
STREAM_RECIPE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Streams:
    def model(self): ...
    def dataset(self, split): return (number for number in range(4))
    def loss(self, model, batch): ...
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """my_own and similar modules, importable during one test only."""
    (tmp_path / "my_own.py").write_text(RECIPE_MODULE)
    (tmp_path / "my_broken.py").write_text("import not_installed_anywhere")
    (tmp_path / "my_failing.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def get_usage_error(call, *args) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTarget:
    @pytest.mark.parametrize("target", [None, "", "???", 3])
    def test_missing_target_is_refused(self, target):
        assert "recipe._target_ is missing" in get_usage_error(build_recipe, {"_target_": target, "trust": []})

    def test_misspelled_class_suggests_the_closest(self):
        assert "did you mean Mine?" in get_usage_error(build_recipe, SPEC | {"_target_": "my_own.Mien"})

    def test_missing_module_is_refused(self):
        message = get_usage_error(build_recipe, {"_target_": "my_missing.Mine", "trust": ["my_missing"]})
        assert "my_missing does not import: No module named 'my_missing'" in message

    def test_missing_import_of_module_is_reported(self):
        message = get_usage_error(build_recipe, {"_target_": "my_broken.Mine", "trust": ["my_broken"]})
        assert "my_broken does not import: No module named 'not_installed_anywhere'" in message

    def test_exception_on_import_is_reported(self):
        message = get_usage_error(build_recipe, {"_target_": "my_failing.Mine", "trust": ["my_failing"]})
        assert "my_failing fails on import: ZeroDivisionError" in message

    def test_class_without_required_method_is_refused(self):
        assert "it has no loss" in get_usage_error(build_recipe, SPEC | {"_target_": "my_own.NoLoss"})

    def test_class_must_be_a_dataclass(self):
        assert "it is not a dataclass" in get_usage_error(build_recipe, SPEC | {"_target_": "my_own.Plain"})

    @pytest.mark.parametrize(
        "extra", [{"_target_": "os.system"}, {"deep": {"_target_": "my_own.Plain"}}, [{"_target_": "my_own.Plain"}]]
    )
    def test_nested_target_is_refused(self, extra):
        assert "_target_=" in get_usage_error(build_recipe, SPEC | {"extra": extra})
        assert "my_own" not in sys.modules


class TestFields:
    def test_trust_and_target_are_not_fields(self):
        assert build_recipe(SPEC).width == 64

    @pytest.mark.parametrize(
        ("field", "value", "converted"),
        [
            ("width", 128, 128),
            ("rate", 1, 1.0),
            ("deep", True, True),
            ("norm", "group", "group"),
            ("size", [2, 3], (2, 3)),
            ("size", 8, 8),
            ("size", None, None),
            ("stages", [4, 5, 6], (4, 5, 6)),
            ("stages", [], ()),
            ("names", ["a"], ["a"]),
            ("options", {"a": 1}, {"a": 1}),
            ("extra", {"a": [1]}, {"a": [1]}),
        ],
    )
    def test_value_of_field_type_is_accepted(self, field, value, converted):
        given = getattr(build_recipe(SPEC | {field: value}), field)
        assert given == converted
        assert type(given) is type(converted)

    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            ("width", "128", "int"),
            ("width", 1.0, "int"),
            ("width", True, "int"),
            ("width", None, "int"),
            ("rate", "0.1", "float"),
            ("rate", True, "float"),
            ("deep", 1, "bool"),
            ("name", 3, "str"),
            ("norm", "layer", "Literal['batch', 'group']"),
            ("size", [1, 2, 3], "tuple[int, int]"),
            ("size", ["a", "b"], "tuple[int, int]"),
            ("stages", 4, "tuple[int, ...]"),
            ("stages", [1.5], "tuple[int, ...]"),
            ("options", [1], "dict[str, int]"),
        ],
    )
    def test_value_of_other_type_is_refused(self, field, value, expected):
        message = get_usage_error(build_recipe, SPEC | {field: value})
        assert message.startswith(f"recipe.{field}={value} is a {type(value).__name__}: expected ")
        assert expected in message

    def test_unknown_field_suggests_closest_and_lists_all(self):
        message = get_usage_error(build_recipe, SPEC | {"widht": 3})
        assert "recipe.widht is not a field of Mine: did you mean recipe.width?" in message
        assert "stages" in message

    def test_missing_field_is_refused(self):
        assert "recipe.where is missing" in get_usage_error(build_recipe, SPEC | {"_target_": "my_own.Asks"})


class TestSizes:
    def test_sizes_default_to_dataset_lengths(self):
        assert get_dataset_sizes(
            SimpleNamespace(dataset=lambda split: [1, 2] if split == "train" else [])
        ) == DatasetSizes(2, 0, None)

    def test_sizes_of_recipe_avoid_opening_data(self):
        recipe = SimpleNamespace(size={"train": 5, "val": 1}.get, tokens_per_sample=64)
        assert get_dataset_sizes(recipe) == DatasetSizes(5, 1, 64)

    def test_field_may_be_called_size(self):
        assert get_dataset_sizes(build_recipe(SPEC | {"size": 8})) == DatasetSizes(3, 1, None)

    def test_empty_training_set_is_refused(self):
        assert "is empty" in get_usage_error(get_dataset_sizes, SimpleNamespace(dataset=lambda split: []))

    @pytest.mark.parametrize("size", [None, -1, 2.5, "many"])
    def test_size_that_is_no_number_of_samples_is_refused(self, size):
        message = get_usage_error(get_dataset_sizes, SimpleNamespace(size=lambda split: size))
        assert message.startswith(f"the recipe's size('train') is {size!r}")


def test_fields_that_do_not_alter_what_is_learned_say_so():
    assert find_unlearned_defaults(build_recipe(SPEC)) == {
        "recipe.data": "/data",
        "recipe.cache": None,
        "recipe.mirror": "https://me:***@host/data",
        "recipe.options_of_loader": None,
    }


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


class SizedStream(Stream):
    def __len__(self):
        return 4


class UnsizedStream(Stream):
    def __len__(self):
        raise TypeError("this stream has no length")


class NumberedStream(Stream):
    def __getitem__(self, index):
        return index


class WithoutItems(Dataset):
    def __len__(self):
        return 4


class SizedAndNumberedStream(SizedStream, NumberedStream):
    """A stream that also is a map-style dataset."""


class TestMapStyle:
    @pytest.mark.parametrize(
        ("data", "lacking"),
        [
            (Stream(), "Stream has no len() and no [i]"),
            (SizedStream(), "SizedStream has no [i]"),
            (UnsizedStream(), "UnsizedStream has no len() and no [i]"),
            (NumberedStream(), "NumberedStream has no len()"),
            (ChainDataset([SizedStream()]), "ChainDataset has no [i]"),
            (WithoutItems(), "WithoutItems has no [i]"),
            ((i for i in range(4)), "generator has no len() and no [i]"),
            (iter([1, 2]), "list_iterator has no len() and no [i]"),
            ({1, 2}, "set has no [i]"),
            (None, "NoneType has no len() and no [i]"),
            (DataLoader([1, 2]), "DataLoader has no [i]"),
        ],
    )
    def test_stream_is_refused_with_what_to_return_instead(self, data, lacking):
        refusals = {
            get_usage_error(get_dataset_sizes, SimpleNamespace(dataset=lambda split: data)),
            get_usage_error(get_dataset, SimpleNamespace(dataset=lambda split: data), "train", "real"),
            get_usage_error(get_dataset, SimpleNamespace(dataset=lambda split: data), "train", "synthetic"),
            get_usage_error(get_dataset, SimpleNamespace(synthetic=lambda split: data), "train", "synthetic"),
        }
        [message] = refusals
        assert f"({lacking})" in message
        assert "let dataset('train') return " in message
        assert len(message.splitlines()) == 1

    @pytest.mark.parametrize(
        "data", [[1, 2], (1, 2), range(2), {0: "a", 1: "b"}, torch.ones(2), SizedAndNumberedStream(), "ab"]
    )
    def test_what_has_numbered_items_is_accepted(self, data):
        recipe = SimpleNamespace(dataset=lambda split: data)
        assert get_dataset(recipe, "val", "real") is data
        assert get_dataset_sizes(recipe).train == len(data)

    def test_every_command_gives_the_same_refusal(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "my_streams.py").write_text(STREAM_RECIPE)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("RANK", raising=False)
        job = ["recipe=own", "recipe._target_=my_streams.Streams", "recipe.trust=[my_streams]", "sink=[]"]
        job += ["lr.base=0.1", "lr.base_batch=2"]
        refusals = set()
        for command in ("train", "plan", "tune", "verify"):
            assert main([command, *job]) == EXIT_USAGE
            printed = capsys.readouterr()
            assert printed.out == ""
            refusals.add(printed.err)
        [refusal] = refusals
        assert refusal.startswith("error: the train data of Streams is not a map-style dataset (generator has no len()")
        assert not (tmp_path / "runs").exists()


def test_loss_has_no_metrics_by_default():
    assert Loss(1.0, 2).metrics == {}
