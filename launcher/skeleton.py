"""The verb `new`: a recipe of one's own and its YAML, which train as they are, in the current folder.

The texts are files of `launcher.templates`, in which two names are replaced.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from launcher.errors import RequestError

__all__ = ["class_name", "new", "texts"]

#: The folder that --config-dir is given, in the documentation too.
CONFIG = "mine"
MODULE, CLASS = "my_recipe", "MyRecipe"
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")  # it names a run, too
#: What stands for a value in an override: recipe=null names no file.
VALUES = frozenset({"null", "true", "false", "nan", "inf"})


def new(name: str, here: Path) -> str:
    """Write NAME.py and its YAML into the folder `here`; returns what to tell: the files, and what to type next.

    Raises:
        RequestError: the name cannot be had, or a file is there already; nothing was written.
    """
    why = refusal(name, here)
    if why is not None:
        raise RequestError(f"{' '.join(name.split()) or repr(name)} {why}: type launcher new {free_name(name, here)}")
    made = texts(name)
    write_all({here / path: text for path, text in made.items()})
    words = f"--config-dir {CONFIG} recipe={name}"
    head = "It trains as it is. To train it, to check its loss, to choose its batch:"
    commands = (
        f"launcher {words} launch.workers=2",
        f"launcher verify {words}",
        f"launcher tune {words} launch.workers=2",
    )
    return "\n".join([*made, "", head, "", *commands])


def texts(name: str) -> Mapping[str, str]:
    """The files by their paths."""
    return {
        f"{name}.py": _filled("recipe.py", name),
        f"{CONFIG}/recipe/{name}.yaml": _filled("recipe.yaml", name),
    }


def class_name(name: str) -> str:
    """my_net -> MyNet; with Recipe at its end where the skeleton has that word already, or Python."""
    made = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    used = keyword.iskeyword(made) or made in re.findall(r"\w+", _template("recipe.py"))
    return f"{made}Recipe" if used and made != CLASS else made


def refusal(name: str, here: Path) -> str | None:
    """Why a recipe cannot have this name; None where it can."""
    if not NAME.fullmatch(name):
        return "is no name of a recipe: a letter first, then letters, digits and _, 40 at most"
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name.lower() in VALUES:
        return "is a word of Python's or of the command line's"
    if name in shipped():
        return "is a recipe that is there already"
    for path in texts(name):
        if (here / path).exists() or (here / path).is_symlink():
            return f"is taken: {path} is there already, and nothing is overwritten"
    return hidden(name, here)


def hidden(name: str, here: Path) -> str | None:
    """What NAME.py would hide from every other program's import in this folder, or what would hide it."""
    if name in sys.stdlib_module_names:
        return "is a module of Python's own, which a file of that name would hide"
    spec = find_spec(name)
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if spec.origin is None and places == [here.resolve() / name]:
        return None  # a plain folder, no package: the file goes before it
    return f"is a module already ({spec.origin or places[0]}), which a file of that name would hide"


def free_name(name: str, here: Path) -> str:
    """A name that is free and as close to this one as can be."""
    return next(found for found in _candidates(name) if refusal(found, here) is None)


def _candidates(name: str) -> Iterator[str]:
    words = "_".join(re.findall("[A-Za-z0-9]+", name))[:30].strip("_")
    stem = words if words[:1].isalpha() else f"my_{words}".strip("_") if words else MODULE
    yield stem
    if not stem.startswith("my_"):
        yield f"my_{stem}"
    yield from (f"{stem}_{number}" for number in range(2, 1_000_000))


def shipped() -> frozenset[str]:
    folder = Path(next(iter(import_module("launcher.conf").__path__)))
    return frozenset(path.stem for path in folder.glob("recipe/*.yaml"))


def _filled(template: str, name: str) -> str:
    names = {MODULE: name, CLASS: class_name(name)}
    return re.sub(rf"\b({MODULE}|{CLASS})\b", lambda found: names[found[0]], _template(template))


def _template(name: str) -> str:
    folder = Path(next(iter(import_module("launcher.templates").__path__)))
    return (folder / name).read_text(encoding="utf-8")


# --- all or nothing -----------------------------------------------------------------------------------------------


def write_all(files: Mapping[Path, str]) -> None:
    """Every file, none of which is there yet; where one cannot be written, none is left, and no folder made for it.

    Raises:
        RequestError: one cannot be written.
    """
    made: list[Path] = []
    try:
        for path, text in files.items():
            absent = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            made += reversed(absent)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                made.append(path)
                file.write(text)
    except OSError as problem:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise RequestError(
            f"{problem.filename or path} cannot be written ({problem.strerror}): go to a folder of your own"
        ) from problem
