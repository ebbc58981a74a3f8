"""`launcher new`: valid recipe names, what is written, and that a refusal leaves no files."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from launcher.cli import new_recipe
from launcher.cli.new_recipe import check_recipe_name, find_free_name, make_class_name, make_file_texts, write_skeleton
from launcher.config.compose import compose
from launcher.errors import UsageError
from launcher.plan.training_plan import DatasetSizes
from launcher.recipe import REQUIRED_METHODS, build_recipe, get_dataset_sizes


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a space in its path, importable as under the command."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{folder}/"):
            del sys.modules[name]


def list_tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_new_writes_two_files_and_prints_commands(cwd: Path) -> None:
    message = write_skeleton("a_name_of_24_characters_", cwd)
    files = ["a_name_of_24_characters_.py", "mine/recipe/a_name_of_24_characters_.yaml"]
    assert list_tree(cwd) == sorted(["mine", "mine/recipe", *files])
    assert message.splitlines()[:2] == files
    assert message.splitlines()[-3:] == [
        "launcher --config-dir mine recipe=a_name_of_24_characters_ launch.workers=2",
        "launcher verify --config-dir mine recipe=a_name_of_24_characters_",
        "launcher tune --config-dir mine recipe=a_name_of_24_characters_ launch.workers=2",
    ]
    assert max(map(len, message.splitlines())) <= 80


@pytest.mark.parametrize(
    "name", ["my_disc", "Disc", "a1", "x__y_", "loss", "none", "dataset", "any", "n", "on", "match_"]
)
def test_skeleton_is_a_valid_recipe_with_config(cwd: Path, name: str) -> None:
    """Includes class names that are words of the template or Python keywords, and names that YAML would parse."""
    write_skeleton(name, cwd)
    importlib.invalidate_caches()
    config = compose(["--config-dir", "mine", f"recipe={name}"])
    assert (config.lr.base, config.lr.base_batch, config.train.duration) == (0.1, 64, "10ep")
    assert config.recipe["trust"] == [name] or config.recipe["trust"] == (name,)
    recipe = build_recipe(config.recipe)
    assert type(recipe).__name__ == make_class_name(name)
    assert get_dataset_sizes(recipe) == DatasetSizes(4000, 800, None)
    assert {each.name for each in fields(recipe)} == config.recipe.keys() - {"_target_", "trust"}, (
        "each field has a value"
    )
    model, data = recipe.model(), recipe.dataset("train")
    loss = recipe.loss(model, (data[:8][0], data[:8][1]))
    halves = [recipe.loss(model, (data[span][0], data[span][1])) for span in (slice(0, 4), slice(4, 8))]
    assert loss.total.item() == pytest.approx(sum(half.total.item() for half in halves)), "a sum, no mean"
    assert (loss.count, loss.metrics.keys()) == (8, {"accuracy"})


def test_template_has_required_methods_and_optional_comments() -> None:
    text = make_file_texts("my_disc")["my_disc.py"]
    tree = ast.parse(text)
    [kind] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert kind.name == "MyDisc"
    assert [node.name for node in kind.body if isinstance(node, ast.FunctionDef)] == list(REQUIRED_METHODS)
    for optional in ("size", "tokens_per_sample", "count", "collate", "param_groups", "synthetic"):
        assert re.search(rf"^    # (def )?{optional}\b.*  # .+", text, re.MULTILINE), optional


def test_commented_methods_compile_and_run(cwd: Path) -> None:
    """Uncommented, all of it compiles and meets the recipe interface."""
    text = make_file_texts("full")["full.py"]
    code = re.sub(r"^    # ((?:def |    return|tokens_per_sample =))", r"    \1", text, flags=re.MULTILINE)
    assert code.count("\n    def ") == 8
    (cwd / "full.py").write_text(code)
    importlib.invalidate_caches()
    recipe = importlib.import_module("full").Full()
    assert get_dataset_sizes(recipe) == DatasetSizes(4000, 800, 1024)
    data, model = recipe.dataset("val"), recipe.model()
    batch = recipe.collate([data[0], data[1]])
    assert recipe.count(batch) == 2
    assert recipe.loss(model, batch).count == 2
    assert [len(group["params"]) for group in recipe.param_groups(model)] == [4]
    assert len(recipe.synthetic("train")) == 4000


def test_every_yaml_field_has_a_comment() -> None:
    text = make_file_texts("my_disc")["mine/recipe/my_disc.yaml"]
    assert yaml.safe_load(text)["recipe"] == {
        "_target_": "my_disc.MyDisc",
        "trust": ["my_disc"],
        "hidden": 64,
        "samples": 4000,
    }
    assert re.search(r"^  hidden: 64 +# \S", text, re.MULTILINE)
    assert re.search(r"^  samples: 4000 +# \S", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "reason", "suggestion"),
    [
        ("my-net", "is not a valid recipe name", "my_net"),
        ("3d", "is not a valid recipe name", "my_3d"),
        ("a b\nc", "is not a valid recipe name", "a_b_c"),
        ("../x", "is not a valid recipe name", "x"),
        ("größe", "is not a valid recipe name", "gr_e"),
        ("", "is not a valid recipe name", "my_recipe"),
        ("_", "is not a valid recipe name", "my_recipe"),
        ("__init__", "is not a valid recipe name", "init"),
        ("x" * 41, "is not a valid recipe name", "x" * 30),
        ("class", "is a reserved word of Python", "my_class"),
        ("match", "is a reserved word of Python", "my_match"),
        ("null", "is a reserved word of Python or of the command line", "my_null"),
        ("NaN", "is a reserved word of Python or of the command line", "my_NaN"),
        ("resnet", "is the name of a built-in recipe", "my_resnet"),
        ("own", "is the name of a built-in recipe", "my_own"),
        ("json", "is a module of the Python standard library", "my_json"),
        ("torch", "is an installed module", "my_torch"),
        ("launcher", "is an installed module", "my_launcher"),
    ],
)
def test_invalid_name_is_refused_with_valid_suggestion(cwd: Path, name: str, reason: str, suggestion: str) -> None:
    with pytest.raises(UsageError) as refused:
        write_skeleton(name, cwd)
    message = str(refused.value)
    assert reason in message
    assert "\n" not in message
    assert message.endswith(f": type launcher new {suggestion}")
    assert list_tree(cwd) == []
    write_skeleton(suggestion, cwd)


@pytest.mark.parametrize("existing", ["disc.py", "mine/recipe/disc.yaml", "link"])
def test_existing_files_are_never_overwritten(cwd: Path, existing: str) -> None:
    path = cwd / ("disc.py" if existing == "link" else existing)
    path.parent.mkdir(parents=True, exist_ok=True)
    if existing == "link":
        path.symlink_to(cwd / "nowhere")
    else:
        path.write_text("mine\n")
    before = list_tree(cwd)
    with pytest.raises(UsageError, match=r"disc is taken: \S+ already exists.*: type launcher new my_disc"):
        write_skeleton("disc", cwd)
    assert list_tree(cwd) == before
    assert path.is_symlink() or path.read_text() == "mine\n"


def test_name_of_existing_package_is_refused(cwd: Path) -> None:
    (cwd / "disc").mkdir()
    assert check_recipe_name("disc", cwd) is None, "a folder with data is no package"
    (cwd / "disc" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert "is an installed module" in str(check_recipe_name("disc", cwd))
    assert find_free_name("disc", cwd) == "my_disc"


def test_first_file_is_removed_if_second_fails(cwd: Path) -> None:
    (cwd / "mine").write_text("a file where the folder should be\n")
    with pytest.raises(UsageError, match=r"cannot be written \(.+\): cd to a folder that you can write to") as refused:
        write_skeleton("disc", cwd)
    assert "\n" not in str(refused.value)
    assert list_tree(cwd) == ["mine"]


def test_created_folders_are_removed_on_failure(cwd: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        new_recipe.write_new_files({cwd / "a/b/c.txt": "c", cwd / "a/b/c.txt/d.txt": "d"})
    assert list_tree(cwd) == []
