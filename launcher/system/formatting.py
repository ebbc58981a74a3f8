"""Format numbers, durations and lines of text for people."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, TextIO

__all__ = [
    "Style",
    "can_encode",
    "encodable",
    "format_bytes",
    "format_clock",
    "format_count",
    "format_duration",
    "format_labelled_rows",
    "format_number",
    "format_percentage",
    "format_plural",
    "format_rate",
    "format_shares",
    "strip_control_characters",
    "supports_redraw",
    "to_ascii",
    "wrap_text",
]

#: ASCII replacements for terminals and files without Unicode.
ASCII = str.maketrans({"·": "-", "━": "=", "╸": "-", "─": ".", "█": "#", "▌": "#", "→": ">", "…": "~", "±": "~"})


def supports_redraw(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether the stream is a terminal on which a line can be overwritten."""
    return stream.isatty() and env.get("TERM") != "dumb"


class Style:
    """ANSI colours, used on terminals only and not if NO_COLOR is set."""

    def __init__(self, colours: bool) -> None:
        self._colours = colours

    @classmethod
    def from_stream(cls, stream: TextIO, env: Mapping[str, str] = os.environ) -> Style:
        """The style that this stream supports."""
        return cls(supports_redraw(stream, env) and not env.get("NO_COLOR"))

    def __call__(self, text: str, *codes: int) -> str:
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if self._colours and text else text

    def dim(self, text: str) -> str:
        return self(text, 2)


def can_encode(stream: TextIO, text: str) -> bool:
    """Whether the stream's encoding can represent the text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def to_ascii(text: str, stream: TextIO) -> str:
    """The text with ASCII replacements, for a stream without Unicode."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    return text.translate(ASCII).encode(encoding, "replace").decode(encoding)


def encodable(text: str, stream: TextIO) -> str:
    """The text unchanged, or with ASCII replacements if the stream cannot encode it."""
    return text if can_encode(stream, text) else to_ascii(text, stream)


def format_plural(number: Any, thing: str) -> str:
    """1 worker, 3 workers; an unknown number may be passed as "?"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}" if isinstance(number, int) else f"{number} {thing}s"


def format_count(number: float) -> str:
    """Format a count: 1,437."""
    return f"{number:,.0f}"


def format_number(value: float) -> str:
    """Format a number with about four significant digits: 1,437, 12.51, 0.0213, 1.2e-05."""
    if not math.isfinite(value):
        return str(value)
    if 1e-3 <= abs(value) < 1:
        return f"{value:.4f}".rstrip("0")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_rate(value: float) -> str:
    """Format a throughput: 1,032 or 3.2."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_percentage(share: float) -> str:
    """A share of a whole as a percentage; a small one is not shown as zero."""
    return f"{100 * share:.0f} %" if share >= 0.0095 or share == 0 else "< 1 %"


def format_bytes(number_bytes: float) -> str:
    """Format bytes: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number_bytes < 1000:
            return f"{number_bytes:.3g} {unit}"
        number_bytes /= 1000
    return f"{number_bytes:.3g} TB"


def format_clock(seconds: float) -> str:
    """Format seconds as a clock: 0:41, 1:02:03, 3d 4:05:06."""
    whole = round(max(0.0, seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    text = f"{hours}:{minutes:02}:{secs:02}" if days or hours else f"{minutes}:{secs:02}"
    return f"{days}d {text}" if days else text


def format_duration(seconds: float) -> str:
    """Format a duration: 4.2 s below a minute, otherwise as a clock."""
    return f"{seconds:.3g} s" if seconds < 60 else format_clock(seconds)


def format_shares(values: Sequence[int]) -> str:
    """Format the shares of an update per rank: `32` if they are equal, otherwise `(86, 85x2)`."""
    groups = [(value, len(list(same))) for value, same in groupby(values)]
    if len(groups) == 1:
        return format_count(groups[0][0])
    parts = [format_count(value) + (f"x{times}" if times > 1 else "") for value, times in groups]
    return f"({', '.join(parts if len(parts) <= 6 else [*parts[:5], '…'])})"


def strip_control_characters(text: object) -> str:
    """Remove line breaks and control characters, which any message may contain."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def wrap_text(text: str, width: int, indent: int) -> list[str]:
    """Wrap text at spaces to at most `width` columns; all lines but the first are indented by `indent` spaces."""
    width = max(width, indent + 10)
    lines = textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)
    return lines or [""]


def format_labelled_rows(pairs: Iterable[tuple[str, str]], width: int, style: Style) -> list[str]:
    """Format one label and its text per line, with the texts aligned."""
    pairs = list(pairs)
    column = 4 + max([9, *(len(label) for label, _ in pairs)])
    lines = []
    for label, text in pairs:
        first, *others = wrap_text(f"  {label}".ljust(column) + strip_control_characters(text), width, column)
        lines += [style.dim(first[:column]) + first[column:], *others]
    return lines
