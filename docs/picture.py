"""A run's output as a picture that loads nothing: `launcher recipe=resnet | python docs/picture.py TITLE FILE.svg`."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

title, file = sys.argv[1:]
console = Console(record=True, width=84, file=io.StringIO())
console.print(Text(f"$ {title}\n", style="bold"), Text(sys.stdin.read().strip("\n")), sep="")
svg = console.export_svg(title=title)
Path(file).write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL))
