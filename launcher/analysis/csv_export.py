"""The `export` command: metrics as CSV, one line per update (the last one if an update was repeated)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from launcher.run_dir.metrics_reader import POSITION_FIELDS, MetricValues
from launcher.telemetry.stages import STAGES

__all__ = ["format_csv", "list_columns"]

#: The documented keys in their documented order; the stage keys follow the throughput keys.
COLUMNS_BEFORE_STAGES = (
    "train/loss",
    "train/grad_norm",
    "val/loss",
    "val/accuracy",
    "lr/value",
    "lr/scale",
    "batch/global",
    "batch/per_device",
    "batch/accumulation",
    "batch/world",
    "throughput/samples_per_s",
    "throughput/device/samples_per_s",
    "throughput/tokens_per_s",
    "throughput/mfu",
    "stage/rank",
)
STAGE_COLUMNS = tuple(
    f"stage/{stage}/{what}" for stage in STAGES for what in ("ms", "ms_min", "ms_max", "share", "samples_per_s")
)
COLUMNS_AFTER_STAGES = (
    "memory/peak_bytes",
    "memory/alloc_retries",
    "memory/major_faults",
    "device/utilization",
    "noise/scale",
    "noise/scale_low",
    "noise/scale_high",
    "noise/efficiency",
    "elastic/recovery_s",
    "elastic/lost_samples",
)
COLUMN_ORDER = {
    key: position
    for position, key in enumerate((*POSITION_FIELDS, *COLUMNS_BEFORE_STAGES, *STAGE_COLUMNS, *COLUMNS_AFTER_STAGES))
}


def list_columns(rows: Iterable[MetricValues]) -> list[str]:
    """All keys of the rows: documented keys in their order, then the recipe's own keys sorted by name."""
    return sorted(set().union(*rows), key=lambda key: (COLUMN_ORDER.get(key, len(COLUMN_ORDER)), key))


def format_csv(rows: Iterable[MetricValues]) -> str:
    """A header and one line per row; missing values are empty, numbers keep full precision."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list_columns(rows), lineterminator="\n")
    writer.writerow({key: _escape_formula(key) for key in writer.fieldnames})
    writer.writerows(rows)
    return text.getvalue()


def _escape_formula(name: str) -> str:
    """Prefix a quote to column names that a spreadsheet would evaluate as a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
