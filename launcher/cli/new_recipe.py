"""`launcher new`: write a custom recipe and its YAML, which train unchanged, into the current folder.

The texts are the files of `launcher.cli.templates`, with the module and class names replaced.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from launcher.errors import EXIT_OK, UsageError

__all__ = ["make_class_name", "make_file_texts", "run_new", "write_skeleton"]

#: The folder to pass to --config-dir; the documentation uses it too.
CONFIG_NAME = "mine"
TEMPLATE_MODULE, TEMPLATE_CLASS = "my_recipe", "MyRecipe"
NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")  # also used in run names
#: Words that Hydra parses as values in an override: recipe=null names no file.
YAML_VALUES = frozenset({"null", "true", "false", "nan", "inf"})


def run_new(args: Sequence[str]) -> int:
    """Write the skeleton of a custom recipe into the current folder."""
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError(f"new takes one name, not {' '.join(args) or 'none'}: type launcher new my_recipe")
    print(write_skeleton(args[0], Path()))
    return EXIT_OK


def write_skeleton(name: str, folder: Path) -> str:
    """Write NAME.py and its YAML into a folder; return the message with the files and the next commands.

    Raises:
        UsageError: the name cannot be used, or a file already exists; nothing was written.
    """
    problem = check_recipe_name(name, folder)
    if problem is not None:
        raise UsageError(
            f"{' '.join(name.split()) or repr(name)} {problem}: type launcher new {find_free_name(name, folder)}"
        )
    texts = make_file_texts(name)
    write_new_files({folder / path: text for path, text in texts.items()})
    args = f"--config-dir {CONFIG_NAME} recipe={name}"
    head = "The recipe trains unchanged. To train it, check its loss, or choose its batch:"
    commands = (
        f"launcher {args} launch.workers=2",
        f"launcher verify {args}",
        f"launcher tune {args} launch.workers=2",
    )
    return "\n".join([*texts, "", head, "", *commands])


def make_file_texts(name: str) -> Mapping[str, str]:
    """Return the text of each file by path."""
    return {
        f"{name}.py": _fill_template("recipe.py", name),
        f"{CONFIG_NAME}/recipe/{name}.yaml": _fill_template("recipe.yaml", name),
    }


def make_class_name(name: str) -> str:
    """Convert my_net to MyNet; append Recipe if the name is a Python keyword or occurs in the template."""
    class_name = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    is_taken = keyword.iskeyword(class_name) or class_name in re.findall(r"\w+", _read_template("recipe.py"))
    return f"{class_name}Recipe" if is_taken and class_name != TEMPLATE_CLASS else class_name


def check_recipe_name(name: str, folder: Path) -> str | None:
    """Explain why a recipe cannot have this name; None if it can."""
    if not NAME_PATTERN.fullmatch(name):
        return "is not a valid recipe name: use a letter, then letters, digits and _, at most 40"
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name.lower() in YAML_VALUES:
        return "is a reserved word of Python or of the command line"
    if name in list_shipped_recipes():
        return "is the name of a built-in recipe"
    for path in make_file_texts(name):
        if (folder / path).exists() or (folder / path).is_symlink():
            return f"is taken: {path} already exists and is not overwritten"
    return find_shadowed_module(name, folder)


def find_shadowed_module(name: str, folder: Path) -> str | None:
    """Explain which module NAME.py would shadow for imports in this folder, or which would shadow it."""
    if name in sys.stdlib_module_names:
        return "is a module of the Python standard library, which a file of that name would shadow"
    spec = find_spec(name)
    if spec is None:
        return None
    locations = [Path(location) for location in spec.submodule_search_locations or ()]
    if spec.origin is None and locations == [folder.resolve() / name]:
        return None  # a plain folder without __init__.py: the file takes precedence
    return f"is an installed module ({spec.origin or locations[0]}), which a file of that name would shadow"


def find_free_name(name: str, folder: Path) -> str:
    """Return a valid, unused name that is close to `name`."""
    return next(free for free in _iter_candidate_names(name) if check_recipe_name(free, folder) is None)


def _iter_candidate_names(name: str) -> Iterator[str]:
    words = "_".join(re.findall("[A-Za-z0-9]+", name))[:30].strip("_")
    stem = words if words[:1].isalpha() else f"my_{words}".strip("_") if words else TEMPLATE_MODULE
    yield stem
    if not stem.startswith("my_"):
        yield f"my_{stem}"
    yield from (f"{stem}_{number}" for number in range(2, 1_000_000))


def list_shipped_recipes() -> frozenset[str]:
    folder = Path(next(iter(import_module("launcher.conf").__path__)))
    return frozenset(path.stem for path in folder.glob("recipe/*.yaml"))


def _fill_template(template: str, name: str) -> str:
    names = {TEMPLATE_MODULE: name, TEMPLATE_CLASS: make_class_name(name)}
    return re.sub(rf"\b({TEMPLATE_MODULE}|{TEMPLATE_CLASS})\b", lambda match: names[match[0]], _read_template(template))


def _read_template(name: str) -> str:
    folder = Path(next(iter(import_module("launcher.cli.templates").__path__)))
    return (folder / name).read_text(encoding="utf-8")


# --- atomic writing -----------------------------------------------------------------------------------------------


def write_new_files(files: Mapping[Path, str]) -> None:
    """Write new files; if one cannot be written, remove all files and folders created so far.

    Raises:
        UsageError: a file cannot be written.
    """
    created: list[Path] = []
    try:
        for path, text in files.items():
            absent = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            created += reversed(absent)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                created.append(path)
                file.write(text)
    except OSError as error:
        for path in reversed(created):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise UsageError(
            f"{error.filename or path} cannot be written ({error.strerror}): cd to a folder that you can write to"
        ) from error
