"""Training progress as one line of text or as a bar."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.reading import Reading
from launcher.sinks.tally import Tally
from launcher.sinks.text import Paint, clock, count, figure, rate

__all__ = ["Progress"]

CYAN = 36
SHORTEST_BAR, LONGEST_BAR = 8, 24


class Progress:
    """Formats progress towards `duration` samples; an epoch has `epoch_samples` samples, if known."""

    def __init__(self, tally: Tally, duration: int, epoch_samples: int | None) -> None:
        self._tally = tally
        self._duration = duration
        self._epochs = duration / epoch_samples if epoch_samples else 0.0

    def line(self, reading: Reading, width: int) -> str:
        """One line with share done, update, loss, val metrics, samples/s, time left and LR; the end is cut to fit."""
        done = f"{reading.samples / self._duration:4.0%}" if self._duration else f"{count(reading.samples)} samples"
        validated = [(key.replace("/", " "), figure(value)) for key, value in reading.values.items() if _measured(key)]
        loss = [f"{part:<11}" for part in self._loss()]
        parts = [f"  {done}  update {count(reading.update):<6}", *loss, *(f"{k} {v:<7}" for k, v in validated)]
        return _joined([*parts, *self._speed("samples/s"), *self._left(), *self._rate()], width, "  ").rstrip()

    def bar(self, width: int, paint: Paint) -> str:
        """The bar, followed by as many values as fit."""
        share = self._share()
        figures = [*self._left(), *self._loss(), *self._validated(), *self._speed("/s"), *self._rate()]
        text = _joined([f"{share:4.0%}", *self._epoch(), *figures], width - SHORTEST_BAR - 2, "  ")
        columns = min(LONGEST_BAR, width - len(text) - 2)
        if columns < SHORTEST_BAR:
            return text[:width]
        full = round(share * columns)
        return f" {paint('━' * full, CYAN)}{paint.dim('─' * (columns - full))} {text}"

    def _share(self) -> float:
        last = self._tally.last
        return min(1.0, last.samples / self._duration) if last and self._duration else 0.0

    def _epoch(self) -> list[str]:
        last = self._tally.last
        return [f"epoch {last.epoch + 1}/{figure(self._epochs)}"] if last and self._epochs else []

    def _left(self) -> list[str]:
        last, speed = self._tally.last, self._tally.samples_per_s
        if last is None or speed <= 0 or not self._duration:
            return []
        return [f"{clock((self._duration - last.samples) / speed)} left"]

    def _loss(self) -> list[str]:
        loss = self._tally.values.get("train/loss")
        return [] if loss is None else [f"loss {figure(loss)}"]

    def _validated(self) -> list[str]:
        """The first validation metric that is not a loss, else the validation loss."""
        keys = sorted(filter(_measured, self._tally.values), key=lambda key: "loss" in key)
        return [f"val {figure(self._tally.values[keys[0]])}"] if keys else []

    def _speed(self, unit: str) -> list[str]:
        speed = self._tally.samples_per_s
        return [f"{rate(speed)}{'' if unit.startswith('/') else ' '}{unit}"] if speed else []

    def _rate(self) -> list[str]:
        value = self._tally.values.get("lr/value")
        return [] if value is None else [f"lr {value:.3g}"]


def _measured(key: str) -> bool:
    return key.startswith("val/")


def _joined(parts: Sequence[str], width: int, between: str) -> str:
    """Join the leading parts, as many as fit."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + len(between) + len(part) > width:
            break
        text += between + part
    return text
