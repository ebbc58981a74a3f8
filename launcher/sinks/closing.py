"""The console summary at the end of a run: final metrics, time per stage, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.sinks.summary import Facts, Row
from launcher.sinks.tally import StageShare, Tally
from launcher.sinks.text import Paint, count, figure, rate, rows, took

__all__ = ["bottleneck", "closing_lines", "next_steps", "speed_text", "stage_table"]

CYAN, MAGENTA, YELLOW, BLUE, GREEN, GREY = 36, 35, 33, 34, 32, 90
COLOURS = {"data": YELLOW, "transfer": YELLOW, "forward": CYAN, "backward": CYAN, "sync": MAGENTA, "optimizer": BLUE}
BAR_COLUMNS = 36
MOSTLY = 0.5
FILES = ("model.safetensors", "best.safetensors", "checkpoints", "metrics.jsonl", "events.jsonl", "logs", "wandb")

ADVICE = {
    "data": "workers wait for data. Try data.workers=2 or more",
    "transfer": "copying batches to the device. Try a larger batch.per_device",
    "sync": "workers wait for each other. Synchronise less often: larger batch.per_device or batch.accumulation",
    "optimizer": "the optimizer step. A larger batch takes fewer steps per epoch",
    "checkpoint": "saving checkpoints. Try a longer checkpoint.every",
    "other": "validation and work between updates. Try a longer train.validate_every",
}


def closing_lines(tally: Tally, facts: Facts, done: Facts, paint: Paint, width: int) -> list[str]:
    """Return the blocks of the summary, each preceded by a blank line; blocks without content are omitted.

    `done` holds the fields of the `done` event; it is empty if training was stopped early.
    """
    blocks = (
        rows([*_reached(tally, done.get("metrics") or {}), *_noise(tally), *_restarts(tally, done)], width, paint),
        _stages(tally, facts, paint, width),
        rows(_files(facts, finished=bool(done)), width, paint),
    )
    return [line for block in blocks if block for line in ("", *block)]


def speed_text(samples: int, updates: int, seconds: float, samples_per_s: float | None) -> str:
    """Format totals, e.g. 14,370 samples · 230 updates · 14.2 s · 1,012 samples/s."""
    parts = [f"{count(samples)} samples", f"{count(updates)} updates", took(seconds)]
    return " · ".join([*parts, *([f"{rate(samples_per_s)} samples/s"] if samples_per_s else [])])


def stage_table(stages: Sequence[StageShare], paint: Paint, width: int) -> list[str]:
    """One line per stage: name, milliseconds per update, share and a bar; `stages` is sorted, longest first."""
    longest = max((stage.share for stage in stages), default=1.0)
    columns = max(0, min(BAR_COLUMNS, width - 34))
    slowest_ms = max((stage.ms for stage in stages), default=0.0)
    digits = 1 if slowest_ms >= 10 else 2 if slowest_ms >= 1 else 3
    lines = []
    for stage in stages:
        bar = "█" * round(columns * stage.share / longest)
        line = f"  {stage.stage:<11}{stage.ms:>9,.{digits}f} ms {stage.share:>6.1%}"
        lines.append(f"{line}  {paint(bar, COLOURS.get(stage.stage, GREY))}" if bar else line[:width])
    return lines


def bottleneck(stages: Sequence[StageShare], facts: Facts) -> str:
    """The stage that takes longest (forward and backward count together), and one suggestion to reduce it."""
    grouped: dict[str, float] = {}
    for stage in stages:
        name = "compute" if stage.stage in ("forward", "backward") else stage.stage
        grouped[name] = grouped.get(name, 0.0) + stage.share
    name, share = max(grouped.items(), key=lambda item: item[1])
    if name == "compute":
        good = ", as it should be" if share >= MOSTLY else ", the largest part"
        return f"compute, {share:.0%}{good}. Faster: {_faster(facts)}"
    return f"{name}, {share:.0%}: {ADVICE.get(name, 'the longest stage')}"


def next_steps(facts: Facts, finished: bool) -> list[str]:
    """Commands that continue training, sync to W&B or open TensorBoard; only those that apply to this run."""
    folder = Path(str(facts.get("run_dir") or "."))
    key = f"run.name={folder.name}" if folder.parent.name == "runs" else f"run.dir={folder}"
    steps = [
        f"to continue: {key} and a longer train.duration" if finished else f"to continue: the same command with {key}"
    ]
    if any(folder.glob("wandb/offline-run-*")):
        steps.append(f"wandb sync {folder}/wandb/offline-run-*")
    if (folder / "tensorboard").is_dir():
        steps.append(f"tensorboard --logdir {folder}/tensorboard")
    return steps


def _reached(tally: Tally, metrics: Mapping[str, float]) -> list[Row]:
    last = {**tally.values, **metrics}
    shown = [
        "train/loss",
        *sorted((key for key in last if key.startswith("val/")), key=lambda key: ("loss" not in key, key)),
    ]
    return [(key.replace("/", " "), _metric(key, last[key], tally)) for key in shown if last.get(key) is not None]


def _noise(tally: Tally) -> list[Row]:
    """The gradient noise scale next to the batch size, if measured; otherwise its lower bound, if known."""
    # Only the last row counts: an estimate that is no longer known is not shown.
    values = {} if tally.last is None else tally.last.values
    scale, low, high = (values.get(f"noise/scale{end}") for end in ("", "_low", "_high"))
    if low is None:
        return []
    known = f"at least {figure(low)}" if scale is None or high is None else f"{figure(scale)}"
    interval = f" ({figure(low)} to {figure(high)})" if scale is not None and high is not None else ""
    return [("noise scale", f"{known} samples{interval} · batch {figure(values['batch/global'])}")]


def _restarts(tally: Tally, done: Facts) -> list[Row]:
    """The cost of restarts: over the whole run if `done` has it, else since this process started."""
    restarts, lost = done.get("restarts", 0), done.get("lost_samples", tally.lost_samples)
    again = f"{count(restarts)} restart{'' if restarts == 1 else 's'}"
    parts = [f"{again} took {took(done.get('recovery_s', 0.0))}"] if restarts else []
    parts += [f"{count(lost)} samples were run again"] if lost else []
    return [("lost", ", ".join(parts))] if parts else []


def _metric(key: str, value: float, tally: Tally) -> str:
    best = tally.best.get(key)
    if best is None or figure(best.value) == figure(value):
        return figure(value)
    return f"{figure(value)} (best {figure(best.value)} at update {count(best.update)})"


def _stages(tally: Tally, facts: Facts, paint: Paint, width: int) -> list[str]:
    stages = tally.stages()
    if not stages:
        return []
    total = figure(sum(stage.ms for stage in stages))
    head = f"  time per update: {total} ms (mean of {count(tally.updates)} updates)"
    last = rows([("bottleneck", bottleneck(stages, facts))], width, paint)
    return [paint.dim(head[:width]), *stage_table(stages, paint, width), *last]


def _files(facts: Facts, finished: bool) -> list[Row]:
    if not facts.get("run_dir"):
        return []
    steps = next_steps(facts, finished)
    folder = Path(str(facts["run_dir"]))
    there = ", ".join(name for name in FILES if (folder / name).exists())
    return [
        ("files", f"{folder}: {there}" if there else str(folder)),
        ("next", steps[0]),
        *(("", step) for step in steps[1:]),
    ]


def _faster(facts: Facts) -> str:
    if str(facts.get("device", "cpu")).startswith("cpu"):
        return "more workers or a GPU"
    if facts.get("precision") == "fp32":
        return "train.precision=bf16"
    return "more workers"
