"""The command line: a verb first, then flags and overrides in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.errors import RequestError
from launcher.keys import nearest

__all__ = ["Arguments", "Words"]

#: Every flag's name, by the ways to write it.
SWITCHES = {
    "-m": "multirun",
    "--multirun": "multirun",
    "--resolve": "resolve",
    "-h": "help",
    "--help": "help",
    "--version": "version",
}
OPTIONS = {
    "-cd": "config_dir",
    "--config-dir": "config_dir",
    "-c": "cfg",
    "--cfg": "cfg",
    "-i": "info",
    "--info": "info",
}
CHOICES = {
    "cfg": ("job", "hydra", "all"),
    "info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
INSTEAD = {
    "-cn": "experiment=NAME, for DIR/experiment/NAME.yaml and --config-dir DIR",
    "--config-name": "experiment=NAME, for DIR/experiment/NAME.yaml and --config-dir DIR",
    "-cp": "--config-dir DIR",
    "--config-path": "--config-dir DIR",
    "--run": "launcher without it",
    "-p": "--cfg job alone",
    "--package": "--cfg job alone",
}


@dataclass(frozen=True)
class Arguments:
    """`config_dirs` are searched before what is shipped, the first one first; `cfg` and `info` only show."""

    overrides: tuple[str, ...] = ()
    config_dirs: tuple[str, ...] = ()
    multirun: bool = False
    cfg: str | None = None
    info: str | None = None
    resolve: bool = False
    help: bool = False
    version: bool = False

    @classmethod
    def parse(cls, args: Sequence[str]) -> Arguments:
        """The arguments after the verb.

        Raises:
            RequestError: an unknown flag, or one without its value.
        """
        parsed = cls()
        rest = iter(args)
        for arg in rest:
            parsed = parsed._with(arg, rest)
        return parsed

    def _with(self, arg: str, rest: Iterator[str]) -> Arguments:
        flag, equals, value = arg.partition("=")
        if not arg.startswith("-"):
            return replace(self, overrides=(*self.overrides, arg))
        if arg in SWITCHES:
            return replace(self, **{SWITCHES[arg]: True})  # type: ignore[arg-type]
        if flag in OPTIONS:
            return self._option(OPTIONS[flag], flag, value if equals else next(rest, ""))
        raise RequestError(_no_such_flag(flag))

    def _option(self, name: str, flag: str, value: str) -> Arguments:
        if name == "config_dir":
            if not value:
                raise RequestError(f"{flag} has no value: type {flag} DIR")
            return replace(self, config_dirs=(*self.config_dirs, value))
        if value not in CHOICES[name]:
            raise RequestError(f"{flag} {value}: choose from {', '.join(CHOICES[name])}")
        return replace(self, **{name: value})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Words:
    """What stands after a verb that reads runs: paths, even where they hold `=`, and two options."""

    paths: tuple[str, ...] = ()
    output: str | None = None
    json: bool = False
    help: bool = False

    @classmethod
    def parse(cls, verb: str, args: Sequence[str], *, output: bool = False, json: bool = False) -> Words:
        """The arguments of `verb`, which takes `-o` or `format=json` as told.

        Raises:
            RequestError: an option that it does not take.
        """
        parsed, rest = cls(), iter(args)
        for arg in rest:
            if arg in ("-h", "--help"):
                parsed = replace(parsed, help=True)
            elif arg == "-o" and output:
                parsed = replace(parsed, output=next(rest, ""))
                if not parsed.output:
                    raise RequestError("-o has no value: type -o FILE")
            elif arg in ("format=json", "format=text"):
                if arg == "format=json" and not json:
                    raise RequestError(f"{arg} has no meaning for {verb}: leave it out")
                parsed = replace(parsed, json=arg == "format=json")
            elif arg.startswith(("-", "format=")):
                takes = [*(["-o FILE"] if output else []), *(["format=json"] if json else [])]
                raise RequestError(f"{arg} is no option of {verb}: it takes {' and '.join(takes)}, and paths (./{arg})")
            else:
                parsed = replace(parsed, paths=(*parsed.paths, arg))
        return parsed


def _no_such_flag(flag: str) -> str:
    if flag in INSTEAD:
        return f"{flag} is not taken here: type {INSTEAD[flag]}"
    known = [*SWITCHES, *OPTIONS]
    meant = nearest(flag, known)
    if meant:
        return f"{flag} is no flag: did you mean {meant}?"
    return (
        f"{flag} is no flag: overrides are typed without dashes, e.g. batch.per_device=32; launcher --help shows them"
    )
