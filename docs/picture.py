"""A run's output as a picture: `make train | tail -n +2 | python docs/picture.py docs/first-run.svg`."""

import io
import sys

from rich.console import Console
from rich.text import Text

console = Console(record=True, width=92, file=io.StringIO())
console.print(Text("$ make train\n", style="bold"), Text(sys.stdin.read().strip("\n")), sep="")
console.save_svg(sys.argv[1], title="make train")
