"""Which classes a configuration may name, and which values recipe fields accept."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.config.trusted_classes import load_class
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes
from launcher.recipe import Loss, build_recipe, get_dataset_sizes

OWN = """
from __future__ import annotations
from dataclasses import dataclass
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


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """my_own and similar modules, importable during one test only."""
    (tmp_path / "my_own.py").write_text(OWN)
    (tmp_path / "my_own_evil.py").write_text("raise SystemError('imported although not trusted')")
    (tmp_path / "my_broken.py").write_text("import not_installed_anywhere")
    (tmp_path / "my_failing.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def refusal(call, *args) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTrust:
    @pytest.mark.parametrize("target", ["launcher.recipes.mlp.Mlp", "torch.optim.SGD", "torch.optim.sgd.SGD"])
    def test_shipped_recipes_and_torch_need_no_entry(self, target):
        assert load_class(target, ()).__name__ == target.rpartition(".")[2]

    @pytest.mark.parametrize("trust", [["my_own"], ["my_own.Mine"], ["other", "my_own"]])
    def test_an_entry_names_a_module_or_a_class(self, trust):
        assert load_class("my_own.Mine", trust).__name__ == "Mine"

    @pytest.mark.parametrize("trust", [[], ["my"], ["my_own.Other"], ["my_own.Min"], [""], ["launcher"]])
    def test_without_an_entry_that_covers_it_nothing_is_imported(self, trust):
        assert "recipe.trust=[my_own]" in refusal(load_class, "my_own.Mine", trust)
        assert "my_own" not in sys.modules

    def test_a_name_that_only_begins_alike_is_not_covered(self):
        assert "recipe.trust=[my_own_evil]" in refusal(load_class, "my_own_evil.Mine", ["my_own"])
        assert "my_own_evil" not in sys.modules

    @pytest.mark.parametrize("target", ["os.system", "builtins.eval", "subprocess.Popen", "launcher.train.loop.Loop"])
    def test_the_rest_of_python_and_of_the_launcher_is_not_trusted(self, target):
        assert "is not trusted" in refusal(load_class, target, ())

    @pytest.mark.parametrize("target", ["launcher.recipes.mlp.Loss", "launcher.recipes.digits.Path"])
    def test_what_a_trusted_module_imports_is_not_trusted(self, target):
        assert "is only imported there" in refusal(load_class, target, ())

    @pytest.mark.parametrize("target", ["torch.load", "launcher.recipes.digits.table", "launcher.recipes.images.os"])
    def test_functions_and_modules_are_no_classes(self, target):
        assert "is not a class" in refusal(load_class, target, ())

    def test_a_single_word_of_trust_is_no_list(self):
        assert "type recipe.trust=[my_own]" in refusal(load_class, "my_own.Mine", "my_own")

    def test_a_target_without_a_module(self):
        assert "has no module" in refusal(load_class, "Mine", ["Mine"])


class TestTarget:
    @pytest.mark.parametrize("target", [None, "", "???", 3])
    def test_missing(self, target):
        assert "recipe._target_ is missing" in refusal(build_recipe, {"_target_": target, "trust": []})

    def test_a_misspelt_class_is_answered_with_the_nearest(self):
        assert "did you mean Mine?" in refusal(build_recipe, SPEC | {"_target_": "my_own.Mien"})

    def test_a_module_that_is_not_there(self):
        message = refusal(build_recipe, {"_target_": "my_missing.Mine", "trust": ["my_missing"]})
        assert "my_missing does not import: No module named 'my_missing'" in message

    def test_a_module_whose_import_is_missing(self):
        message = refusal(build_recipe, {"_target_": "my_broken.Mine", "trust": ["my_broken"]})
        assert "my_broken does not import: No module named 'not_installed_anywhere'" in message

    def test_a_module_that_fails(self):
        message = refusal(build_recipe, {"_target_": "my_failing.Mine", "trust": ["my_failing"]})
        assert "my_failing fails on import: ZeroDivisionError" in message

    def test_a_class_that_lacks_a_method(self):
        assert "it has no loss" in refusal(build_recipe, SPEC | {"_target_": "my_own.NoLoss"})

    def test_a_class_that_is_no_dataclass(self):
        assert "it is not a dataclass" in refusal(build_recipe, SPEC | {"_target_": "my_own.Plain"})

    @pytest.mark.parametrize(
        "extra", [{"_target_": "os.system"}, {"deep": {"_target_": "my_own.Plain"}}, [{"_target_": "my_own.Plain"}]]
    )
    def test_a_value_may_not_carry_a_target(self, extra):
        assert "_target_=" in refusal(build_recipe, SPEC | {"extra": extra})
        assert "my_own" not in sys.modules


class TestFields:
    def test_trust_and_target_are_not_passed(self):
        assert build_recipe(SPEC).width == 64

    @pytest.mark.parametrize(
        ("field", "value", "becomes"),
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
    def test_accepted(self, field, value, becomes):
        given = getattr(build_recipe(SPEC | {field: value}), field)
        assert given == becomes
        assert type(given) is type(becomes)

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
    def test_refused(self, field, value, expected):
        message = refusal(build_recipe, SPEC | {field: value})
        assert message.startswith(f"recipe.{field}={value} is a {type(value).__name__}: expected ")
        assert expected in message

    def test_an_unknown_field_is_answered_with_the_nearest_and_the_list(self):
        message = refusal(build_recipe, SPEC | {"widht": 3})
        assert "recipe.widht is not a field of Mine: did you mean recipe.width?" in message
        assert "stages" in message

    def test_a_missing_field(self):
        assert "recipe.where is missing" in refusal(build_recipe, SPEC | {"_target_": "my_own.Asks"})


class TestSizes:
    def test_from_the_data_where_the_recipe_does_not_say(self):
        assert get_dataset_sizes(
            SimpleNamespace(dataset=lambda split: [1, 2] if split == "train" else [])
        ) == DatasetSizes(2, 0, None)

    def test_from_the_recipe_without_opening_the_data(self):
        recipe = SimpleNamespace(size={"train": 5, "val": 1}.get, tokens_per_sample=64)
        assert get_dataset_sizes(recipe) == DatasetSizes(5, 1, 64)

    def test_a_field_may_be_called_size(self):
        assert get_dataset_sizes(build_recipe(SPEC | {"size": 8})) == DatasetSizes(3, 1, None)

    def test_nothing_to_train_on(self):
        assert "is empty" in refusal(get_dataset_sizes, SimpleNamespace(dataset=lambda split: []))

    def test_data_without_a_length(self):
        assert "has no len()" in refusal(get_dataset_sizes, SimpleNamespace(dataset=iter))


def test_loss_without_metrics():
    assert Loss(1.0, 2).metrics == {}
