"""Parse the command line: a command first, then flags and overrides in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.config.keys import closest_match
from launcher.config.misnames import find_by_other_name
from launcher.errors import UsageError

__all__ = ["HydraArgs", "ReportArgs"]

#: Spelling of each flag without a value -> attribute of Arguments.
SWITCHES = {
    "-m": "multirun",
    "--multirun": "multirun",
    "--resolve": "resolve",
    "--version": "version",
}
OPTIONS = {
    "-cd": "config_dir",
    "--config-dir": "config_dir",
    "-c": "cfg",
    "--cfg": "cfg",
    "-i": "info",
    "--info": "info",
    "--shard": "shard",
}
CHOICES = {
    "cfg": ("job", "hydra", "all"),
    "info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
UNSUPPORTED_FLAGS = {
    "-cn": "experiment=NAME, for DIR/experiment/NAME.yaml and --config-dir DIR",
    "--config-name": "experiment=NAME, for DIR/experiment/NAME.yaml and --config-dir DIR",
    "-cp": "--config-dir DIR",
    "--config-path": "--config-dir DIR",
    "--run": "launcher without it",
    "-p": "only --cfg job",
    "--package": "only --cfg job",
}


@dataclass(frozen=True)
class HydraArgs:
    """The parsed flags and overrides.

    `config_dirs` are searched before the shipped configuration, in the order given. `cfg` and `info` only print.
    `shard`: (k, n) to run only every n-th point of a sweep, starting at point k.
    """

    overrides: tuple[str, ...] = ()
    config_dirs: tuple[str, ...] = ()
    multirun: bool = False
    shard: tuple[int, int] = (0, 1)
    cfg: str | None = None
    info: str | None = None
    resolve: bool = False
    version: bool = False

    @classmethod
    def parse(cls, args: Sequence[str]) -> HydraArgs:
        """Parse the arguments after the command.

        Raises:
            UsageError: a flag is unknown or lacks its value.
        """
        parsed = cls()
        rest = iter(args)
        for arg in rest:
            parsed = parsed._add_argument(arg, rest)
        return parsed

    def _add_argument(self, arg: str, rest: Iterator[str]) -> HydraArgs:
        flag, equals, value = arg.partition("=")
        if not arg.startswith("-"):
            return replace(self, overrides=(*self.overrides, arg))
        if arg in SWITCHES:
            return replace(self, **{SWITCHES[arg]: True})  # type: ignore[arg-type]
        if flag in OPTIONS:
            return self._set_option(OPTIONS[flag], flag, value if equals else next(rest, ""))
        raise UsageError(_describe_unknown_flag(flag))

    def _set_option(self, name: str, flag: str, value: str) -> HydraArgs:
        if name == "config_dir":
            if not value:
                raise UsageError(f"{flag} has no value: type {flag} DIR")
            return replace(self, config_dirs=(*self.config_dirs, value))
        if name == "shard":
            return replace(self, shard=_parse_shard(value))
        if value not in CHOICES[name]:
            raise UsageError(f"{flag} {value}: choose from {', '.join(CHOICES[name])}")
        return replace(self, **{name: value})  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReportArgs:
    """The arguments of a command that reads runs: paths, which may contain `=`, and two options."""

    paths: tuple[str, ...] = ()
    output: str | None = None
    json: bool = False

    @classmethod
    def parse(cls, verb: str, args: Sequence[str], *, output: bool = False, json: bool = False) -> ReportArgs:
        """Parse the arguments of command `verb`; `output` and `json` tell whether it accepts `-o` and `format=json`.

        Raises:
            UsageError: the command does not accept an option.
        """
        parsed, rest = cls(), iter(args)
        for arg in rest:
            if arg == "-o" and output:
                parsed = replace(parsed, output=next(rest, ""))
                if not parsed.output:
                    raise UsageError("-o has no value: type -o FILE")
            elif arg in ("format=json", "format=text"):
                if arg == "format=json" and not json:
                    raise UsageError(f"{arg} has no effect for {verb}: leave it out")
                parsed = replace(parsed, json=arg == "format=json")
            elif arg.startswith(("-", "format=")):
                takes = [*(["-o FILE"] if output else []), *(["format=json"] if json else [])]
                raise UsageError(
                    f"{arg} is not an option of {verb}: it takes {' and '.join(takes)}, and paths (./{arg})"
                )
            else:
                parsed = replace(parsed, paths=(*parsed.paths, arg))
        return parsed


def _parse_shard(value: str) -> tuple[int, int]:
    """Parse `1/4`: every fourth point of a sweep, starting at point 1."""
    first, _, of = value.partition("/")
    if not (first.isdigit() and of.isdigit() and int(of)):
        raise UsageError(f"--shard {value}: type index/count, e.g. --shard=0/4")
    return int(first), int(of)


def _describe_unknown_flag(flag: str) -> str:
    if flag in UNSUPPORTED_FLAGS:
        return f"{flag} is not supported: type {UNSUPPORTED_FLAGS[flag]}"
    setting = find_by_other_name(flag.lstrip("-"))
    match = closest_match(flag, [*SWITCHES, *OPTIONS, "--help"])
    if match and not setting:
        return f"{flag} is not a flag: did you mean {match}?"
    setting = setting or "batch.per_device=32"
    example = setting if "=" in setting else f"{setting}=..."
    return f"{flag} is not a flag: overrides are typed without dashes, e.g. {example}; see launcher --help"
