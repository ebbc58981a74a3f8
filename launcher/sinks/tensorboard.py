"""TensorBoard sink: event files in the run folder's `tensorboard/`; the step is the sample count."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import RequestError
from launcher.reading import Event, Reading
from launcher.sinks.thin import SELDOM_S, Thinner

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Tensorboard"]


class Tensorboard:
    """Writes rows as scalars and events as text.

    Raises:
        UsageError: the package is not installed; this is checked without importing it.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboard") is None:
            raise RequestError(
                "sink=tensorboard needs a package that is not installed: "
                "type pip install 'elastic-batch-launcher[report]', or remove it from sink="
            )
        self.every_s = SELDOM_S
        self._folder = folder / "tensorboard"
        self._thinner = Thinner()
        self._samples = 0
        self._writer: SummaryWriter | None = None

    def write(self, entry: Reading | Event) -> None:
        if isinstance(entry, Event):
            self._text(entry)
        elif self._thinner.passes(entry):
            self._row(entry)

    def close(self) -> None:
        if (last := self._thinner.last()) is not None:
            self._row(last)
        if self._writer is not None:
            self._writer.close()  # type: ignore[no-untyped-call]

    def _row(self, reading: Reading) -> None:
        writer, self._samples = self._opened(), reading.samples
        for key, value in reading.values.items():
            writer.add_scalar(key, value, global_step=reading.samples, walltime=reading.time)

    def _text(self, event: Event) -> None:
        facts = "\n".join(f"- {name}: {value}" for name, value in event.facts.items())
        self._opened().add_text(f"event/{event.event}", facts, global_step=self._samples, walltime=event.time)

    def _opened(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # deferred: takes most of a second

            self._writer = SummaryWriter(str(self._folder))  # type: ignore[no-untyped-call]
        return self._writer
