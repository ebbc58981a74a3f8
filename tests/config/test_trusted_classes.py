"""Which classes a configuration may name."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import pytest

from launcher.config.trusted_classes import load_class
from launcher.errors import UsageError
from launcher.system import garbage_collection


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """my_own and my_own_evil, importable during one test only."""
    (tmp_path / "my_own.py").write_text("class Mine: ...\n")
    (tmp_path / "my_own_evil.py").write_text("raise SystemError('imported although not trusted')")
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


@pytest.mark.parametrize("target", ["launcher.recipes.mlp.Mlp", "torch.optim.SGD", "torch.optim.sgd.SGD"])
def test_shipped_recipes_and_torch_are_trusted(target):
    assert load_class(target, ()).__name__ == target.rpartition(".")[2]


@pytest.mark.parametrize("trust", [["my_own"], ["my_own.Mine"], ["other", "my_own"]])
def test_trust_entry_names_module_or_class(trust):
    assert load_class("my_own.Mine", trust).__name__ == "Mine"


def test_garbage_that_exists_when_a_class_is_loaded_is_collected_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the module itself, and that of a process which loads classes again and again."""
    (tmp_path / "my_lists.py").write_text(
        "class Mine: ...\ngone = Mine()\ngone.own = gone\nimport weakref\ngone = weakref.ref(gone)"
    )
    monkeypatch.setattr(garbage_collection, "_owned", True)
    before = gc.get_freeze_count()
    for target in ("my_lists.Mine", "my_lists.Mine", "launcher.recipes.mlp.Mlp"):
        load_class(target, ["my_lists"])
    gc.collect()
    assert sys.modules["my_lists"].gone() is None
    assert gc.get_freeze_count() <= before
    assert gc.isenabled()


@pytest.mark.parametrize("trust", [[], ["my"], ["my_own.Other"], ["my_own.Min"], [""], ["launcher"]])
def test_untrusted_module_is_never_imported(trust):
    assert "recipe.trust=[my_own]" in get_usage_error(load_class, "my_own.Mine", trust)
    assert "my_own" not in sys.modules


def test_common_name_prefix_is_not_trusted():
    assert "recipe.trust=[my_own_evil]" in get_usage_error(load_class, "my_own_evil.Mine", ["my_own"])
    assert "my_own_evil" not in sys.modules


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "subprocess.Popen", "launcher.train.loop.Loop"])
def test_stdlib_and_launcher_classes_are_not_trusted(target):
    assert "is not trusted" in get_usage_error(load_class, target, ())


@pytest.mark.parametrize("target", ["launcher.recipes.mlp.Loss", "launcher.recipes.digits.Path"])
def test_imports_of_trusted_module_are_not_trusted(target):
    assert "is only imported there" in get_usage_error(load_class, target, ())


@pytest.mark.parametrize("target", ["torch.load", "launcher.recipes.digits.load_table", "launcher.recipes.images.os"])
def test_functions_and_modules_are_refused(target):
    assert "is not a class" in get_usage_error(load_class, target, ())


def test_trust_must_be_a_list():
    assert "type recipe.trust=[my_own]" in get_usage_error(load_class, "my_own.Mine", "my_own")


def test_target_without_module_is_refused():
    assert "has no module" in get_usage_error(load_class, "Mine", ["Mine"])
