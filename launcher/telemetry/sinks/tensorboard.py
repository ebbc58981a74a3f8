"""TensorBoard sink: event files in the run directory's `tensorboard/`; the step is the sample count."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.system.run_files import TENSORBOARD_DIR
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks.rate_limit import SLOW_SINK_INTERVAL_S, RowRateLimiter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorboardSink"]


class TensorboardSink:
    """Writes rows as scalars and events as text.

    Raises:
        UsageError: the package is not installed; this is checked without importing it.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboard") is None:
            raise UsageError(
                "sink=tensorboard needs a package that is not installed: "
                "type pip install 'elastic-batch-launcher[report]', or remove it from sink="
            )
        self.write_interval_s = SLOW_SINK_INTERVAL_S
        self._folder = folder / TENSORBOARD_DIR
        self._rate_limiter = RowRateLimiter()
        self._samples = 0
        self._writer: SummaryWriter | None = None

    def write(self, entry: MetricsRow | Event) -> None:
        if isinstance(entry, Event):
            self._write_event_text(entry)
        elif self._rate_limiter.accept(entry):
            self._write_scalars(entry)

    def close(self) -> None:
        if (last := self._rate_limiter.get_held_row()) is not None:
            self._write_scalars(last)
        if self._writer is not None:
            self._writer.close()  # type: ignore[no-untyped-call]

    def _write_scalars(self, row: MetricsRow) -> None:
        writer, self._samples = self._get_writer(), row.samples
        for key, value in row.values.items():
            writer.add_scalar(key, value, global_step=row.samples, walltime=row.time)

    def _write_event_text(self, event: Event) -> None:
        facts = "\n".join(f"- {name}: {value}" for name, value in event.fields.items())
        self._get_writer().add_text(f"event/{event.event}", facts, global_step=self._samples, walltime=event.time)

    def _get_writer(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # deferred: takes most of a second

            self._writer = SummaryWriter(str(self._folder))  # type: ignore[no-untyped-call]
        return self._writer
