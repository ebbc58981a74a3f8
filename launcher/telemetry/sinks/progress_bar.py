"""Training progress as one line of text or as a bar."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.system.formatting import Style, format_clock, format_count, format_number, format_rate
from launcher.telemetry.records import MetricsRow
from launcher.telemetry.sinks.running_stats import RunningStats

__all__ = ["ProgressFormatter"]

CYAN = 36
MIN_BAR_COLUMNS, MAX_BAR_COLUMNS = 8, 24


class ProgressFormatter:
    """Formats progress towards `duration` samples; an epoch has `epoch_samples` samples, if known."""

    def __init__(self, stats: RunningStats, duration: int, epoch_samples: int | None) -> None:
        self._stats = stats
        self._duration = duration
        self._epochs = duration / epoch_samples if epoch_samples else 0.0

    def format_line(self, row: MetricsRow, width: int) -> str:
        """One line with share done, update, loss, val metrics, samples/s, time left and LR; the end is cut to fit."""
        done = f"{row.samples / self._duration:4.0%}" if self._duration else f"{format_count(row.samples)} samples"
        validated = [
            (key.replace("/", " "), format_number(value))
            for key, value in row.values.items()
            if _is_validation_metric(key)
        ]
        loss = [f"{part:<11}" for part in self._format_loss()]
        parts = [f"  {done}  update {format_count(row.update):<6}", *loss, *(f"{k} {v:<7}" for k, v in validated)]
        return _join_fitting(
            [*parts, *self._format_speed("samples/s"), *self._format_time_left(), *self._format_lr()], width, "  "
        ).rstrip()

    def format_bar(self, width: int, style: Style) -> str:
        """The bar, followed by as many values as fit."""
        share = self._compute_share()
        values = [
            *self._format_time_left(),
            *self._format_loss(),
            *self._format_validation(),
            *self._format_speed("/s"),
            *self._format_lr(),
        ]
        text = _join_fitting([f"{share:4.0%}", *self._format_epoch(), *values], width - MIN_BAR_COLUMNS - 2, "  ")
        columns = min(MAX_BAR_COLUMNS, width - len(text) - 2)
        if columns < MIN_BAR_COLUMNS:
            return text[:width]
        filled = round(share * columns)
        return f" {style('━' * filled, CYAN)}{style.dim('─' * (columns - filled))} {text}"

    def _compute_share(self) -> float:
        last = self._stats.last
        return min(1.0, last.samples / self._duration) if last and self._duration else 0.0

    def _format_epoch(self) -> list[str]:
        last = self._stats.last
        return [f"epoch {last.epoch + 1}/{format_number(self._epochs)}"] if last and self._epochs else []

    def _format_time_left(self) -> list[str]:
        last, speed = self._stats.last, self._stats.samples_per_s
        if last is None or speed <= 0 or not self._duration:
            return []
        return [f"{format_clock((self._duration - last.samples) / speed)} left"]

    def _format_loss(self) -> list[str]:
        loss = self._stats.values.get("train/loss")
        return [] if loss is None else [f"loss {format_number(loss)}"]

    def _format_validation(self) -> list[str]:
        """The first validation metric that is not a loss, else the validation loss."""
        keys = sorted(filter(_is_validation_metric, self._stats.values), key=lambda key: "loss" in key)
        return [f"val {format_number(self._stats.values[keys[0]])}"] if keys else []

    def _format_speed(self, unit: str) -> list[str]:
        speed = self._stats.samples_per_s
        space = "" if unit.startswith("/") else " "
        return [f"{format_rate(speed)}{space}{unit}"] if speed else []

    def _format_lr(self) -> list[str]:
        value = self._stats.values.get("lr/value")
        return [] if value is None else [f"lr {value:.3g}"]


def _is_validation_metric(key: str) -> bool:
    return key.startswith("val/")


def _join_fitting(parts: Sequence[str], width: int, between: str) -> str:
    """Join the leading parts, as many as fit."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + len(between) + len(part) > width:
            break
        text += between + part
    return text
