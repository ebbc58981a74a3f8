"""What a person reads at the start and at the end of a run, as lines of text. Nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.sinks.tally import StageShare, Tally
from launcher.sinks.text import Paint, count, figure, one_line, rate, rows, shares, took

__all__ = ["bottleneck", "closing", "plan_text", "rate_text", "resize_text", "stage_table", "start_rows"]

Facts = Mapping[str, Any]
Row = tuple[str, str]

COLOURS = {
    "data": 33,
    "transfer": 33,
    "forward": 36,
    "backward": 36,
    "sync": 35,
    "optimizer": 34,
    "checkpoint": 32,
    "other": 37,
}
BAR_COLUMNS = 30

ADVICE = {
    "data": "the workers wait for data: try data.workers={more}",
    "transfer": "copying to the device takes longest: try a larger batch.per_device, or data.workers=2",
    "compute": "computing is where the time should go; {faster} will help",
    "sync": "the workers wait for each other: synchronise less often with a larger batch.per_device or accumulation",
    "optimizer": "the step itself takes longest: a larger batch means fewer steps per epoch",
    "checkpoint": "saving takes longest: save less often with a longer checkpoint.every",
    "other": "validation and what lies between the updates takes longest: try a longer train.validate_every",
}


def start_rows(facts: Facts) -> list[Row]:
    """What will be trained, on what, for how long. A fact that is absent leaves no gap."""
    pairs = (
        ("data", _data(facts)),
        ("model", _model(facts)),
        ("device", _device(facts)),
        ("length", _length(facts)),
        ("optimizer", " · ".join(_words(facts, "optimizer", "decay"))),
        ("folder", str(facts.get("run_dir", ""))),
    )
    return [(label, text) for label, text in pairs if text]


def plan_text(facts: Facts) -> str:
    """256 = 3 workers x (86, 85x2) in 2 micro-batches"""
    world, accumulation = facts.get("world", 1), facts.get("accumulation") or 1
    workers = f"{count(world)} worker{'s' if world != 1 else ''} x {shares(facts.get('shares') or [facts['global']])}"
    steps = f" in {accumulation} micro-batches" if accumulation > 1 else ""
    return f"{count(facts['global'])} = {workers}{steps}"


def rate_text(facts: Facts) -> str:
    """0.1 (x0.5 of 0.2 at 64)"""
    scale = facts.get("lr_scale", 1.0)
    base = facts.get("lr_base", facts["lr"] / scale if scale else facts["lr"])
    at = f" at {count(facts['lr_base_batch'])}" if facts.get("lr_base_batch") else ""
    return f"{figure(facts['lr'])} (x{figure(scale)} of {figure(base)}{at})"


def warmup_text(facts: Facts, train_samples: int | None) -> str:
    samples = facts.get("warmup_samples") or 0
    if not samples:
        return "no warmup"
    epochs = f" ({figure(samples / train_samples)} epochs)" if train_samples else ""
    return f"warmup {count(samples)} samples{epochs}"


def resize_text(facts: Facts) -> str:
    """3 -> 2 workers · batch 256 -> 256 · rate 0.1 -> 0.1 · why"""
    before, after = facts.get("from") or {}, facts.get("to") or {}
    parts = [f"{before.get('world', '?')} -> {after.get('world', '?')} workers"]
    parts += [
        f"{name} {figure(before[key])} -> {figure(after[key])}"
        for name, key in (("batch", "global"), ("rate", "lr"))
        if key in before and key in after
    ]
    return " · ".join([*parts, *_words(facts, "why")])


def stage_table(stages: Sequence[StageShare], paint: Paint, width: int) -> list[str]:
    """stage, milliseconds per update, share and a bar, the longest first."""
    longest = max((stage.share for stage in stages), default=1.0)
    columns = max(0, min(BAR_COLUMNS, width - 40))
    lines = []
    for stage in stages:
        bar = "█" * max(1, round(columns * stage.share / longest)) if columns else ""
        figures = f"  {stage.stage:<11}{figure(stage.ms):>9} ms {stage.share:>6.1%}  "
        lines.append(figures + paint(bar, COLOURS.get(stage.stage, 37)))
    return lines


def bottleneck(stages: Sequence[StageShare], facts: Facts) -> str:
    """The stage that takes longest, forward and backward counted as one, and one thing to do about it."""
    grouped: dict[str, float] = {}
    for stage in stages:
        name = "compute" if stage.stage in ("forward", "backward") else stage.stage
        grouped[name] = grouped.get(name, 0.0) + stage.share
    name, share = max(grouped.items(), key=lambda item: item[1])
    shown = "forward and backward" if name == "compute" else name
    advice = ADVICE.get(name, "this takes longest").format(more=_loaders(facts), faster=_faster(facts))
    return f"{shown}, {share:.0%}: {advice}"


def closing(title: str, tally: Tally, facts: Facts, metrics: Mapping[str, float], next_steps: Sequence[str]) -> Closing:
    return Closing(title, tally, facts, metrics, next_steps)


class Closing:
    """The last block: what was reached, where the time went, where the files are and what to type next."""

    def __init__(
        self, title: str, tally: Tally, facts: Facts, metrics: Mapping[str, float], next_steps: Sequence[str]
    ) -> None:
        self._title = title
        self._tally = tally
        self._facts = facts
        self._metrics = {key: value for key, value in tally.values.items() if key == "train/loss"} | {
            key: value for key, value in (tally.values | dict(metrics)).items() if key.startswith("val/")
        }
        self._next = next_steps

    def lines(self, paint: Paint, width: int) -> list[str]:
        blocks = [rows(self._reached(), width, paint), self._stages(paint, width), rows(self._files(), width, paint)]
        return [line for block in blocks if block for line in ("", *block)]

    def _reached(self) -> list[Row]:
        return [(key.replace("/", " "), self._metric(key, value)) for key, value in self._metrics.items()]

    def _metric(self, key: str, value: float) -> str:
        best = self._tally.best.get(key)
        if best is None or best.value == value:
            return figure(value)
        return f"{figure(value)} (best {figure(best.value)} at update {count(best.update)})"

    def _stages(self, paint: Paint, width: int) -> list[str]:
        stages = self._tally.stages()
        if not stages:
            return []
        head = f"  where an update's {figure(sum(stage.ms for stage in stages))} ms go"
        return [
            paint.dim(head),
            *stage_table(stages, paint, width),
            *rows([("bottleneck", bottleneck(stages, self._facts))], width, paint),
        ]

    def _files(self) -> list[Row]:
        folder = self._facts.get("run_dir")
        pairs = [("files", str(folder))] if folder else []
        return pairs + [("next" if index == 0 else "", step) for index, step in enumerate(self._next)]


def next_steps(facts: Facts, finished: bool) -> list[str]:
    """What to type now: to go on, and to look at the figures elsewhere."""
    folder = Path(str(facts.get("run_dir", ".")))
    key = f"run.name={folder.name}" if folder.parent.name == "runs" else f"run.dir={folder}"
    longer = "a longer train.duration" if finished else "the same command"
    steps = [f"{longer} with {key} goes on from here" if not finished else f"{longer} and {key} go on from here"]
    if list(folder.glob("wandb/offline-run-*")):
        steps.append(f"wandb sync {folder}/wandb/offline-run-*")
    if (folder / "tensorboard").is_dir():
        steps.append(f"tensorboard --logdir {folder}/tensorboard")
    return steps
