"""The syntax of the launch.* keys that become sbatch options."""

from __future__ import annotations

import math
import re

from launcher.config.schema import LaunchConfig
from launcher.errors import UsageError

__all__ = [
    "CONSTRAINT_PATTERN",
    "EXTRA_OPTION_PATTERN",
    "FIXED_OPTIONS",
    "JOB_TIME_PATTERN",
    "NODE_RANGE_PATTERN",
    "OPTIONS_WITH_KEYS",
    "PLAIN_NAMES",
    "SECONDS_PER_UNIT",
    "TIME_SPAN_PATTERN",
    "check_extra_option",
    "check_launch_keys",
    "collapse_whitespace",
    "format_time_limit",
    "parse_node_range",
]


#: Values allowed in an #SBATCH line: nothing that Slurm's option parser or a shell would split or expand.
PLAIN_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*(,[A-Za-z0-9][A-Za-z0-9_.@+-]*)*")
CONSTRAINT_PATTERN = re.compile(r"[A-Za-z0-9_.,&|*()\[\]:=!+-]+")
EXTRA_OPTION_PATTERN = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:;/@%+=*&|()\[\]!{}^~-]+)?")
NODE_RANGE_PATTERN = re.compile(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?")
SECONDS_PER_UNIT = {"s": 1, "min": 60, "h": 3600, "d": 86400}
TIME_SPAN_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|d)")
JOB_TIME_PATTERN = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
#: Options that have their own configuration key; FIXED are options that the script depends on.
OPTIONS_WITH_KEYS = {
    "--account": "launch.account",
    "--constraint": "launch.constraint",
    "--job-name": "run.name",
    "--nodes": "launch.nodes",
    "--partition": "launch.partition",
    "--qos": "launch.qos",
    "--time": "launch.time",
}
FIXED_OPTIONS = (
    "--array",
    "--no-requeue",
    "--ntasks",
    "--ntasks-per-node",
    "--parsable",
    "--signal",
    "--test-only",
    "--wrap",
)


def check_launch_keys(launch: LaunchConfig) -> None:
    """Raise UsageError for the first launch key whose value is not valid in an #SBATCH line."""
    parse_node_range(launch.nodes)
    if launch.time is None:
        raise UsageError("launch.time is missing: type how long the job may run, e.g. launch.time=4h")
    format_time_limit(launch.time)
    for name in ("partition", "account", "qos"):
        value = getattr(launch, name)
        if value is not None and not PLAIN_NAMES.fullmatch(value):
            raise UsageError(f"launch.{name}={collapse_whitespace(value)}: type letters, digits and any of _ . @ + - ,")
    if launch.constraint is not None and not CONSTRAINT_PATTERN.fullmatch(launch.constraint):
        raise UsageError(
            f"launch.constraint={collapse_whitespace(launch.constraint)}: type features and & | [ ] ( ) * only"
        )
    for option in launch.extra:
        check_extra_option(option)


def check_extra_option(option: str) -> None:
    setting = f"launch.extra=[{collapse_whitespace(option)}]"
    if not EXTRA_OPTION_PATTERN.fullmatch(option):
        raise UsageError(f"{setting}: type options as --name=value without spaces or quotes, e.g. --gpus-per-node=4")
    name = option.partition("=")[0]
    if name in OPTIONS_WITH_KEYS:
        raise UsageError(f"{setting}: {name} has its own key: type {OPTIONS_WITH_KEYS[name]}=")
    if name in FIXED_OPTIONS:
        raise UsageError(f"{setting}: {name} cannot be changed here: copy slurm/train.sbatch and edit the copy")


def parse_node_range(text: str) -> tuple[int, int]:
    """Parse `2` or `2-4` into (minimum, maximum) nodes."""
    match = NODE_RANGE_PATTERN.fullmatch(text)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise UsageError(
            f"launch.nodes={collapse_whitespace(text)}: type a number or a range, e.g. launch.nodes=2 or 2-4"
        )
    return int(match[1]), int(match[2] or match[1])


def format_time_limit(text: str) -> str:
    """Convert a time to Slurm's format: `4h`, `30min`, `2d` to minutes, rounded up; Slurm's own formats unchanged."""
    if match := TIME_SPAN_PATTERN.fullmatch(text):
        whole = math.ceil(float(match[1]) * SECONDS_PER_UNIT[match[2]] / 60)
        if whole:
            return str(whole)
    elif JOB_TIME_PATTERN.fullmatch(text) and re.search("[1-9]", text):
        return text
    raise UsageError(
        f"launch.time={collapse_whitespace(text)}: type launch.time=4h, 30min, 2d, or Slurm's own 1-12:00:00"
    )


def collapse_whitespace(text: str) -> str:
    return " ".join(text.split())
