"""The console summary at the end of a run: final metrics, time per stage, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.system.formatting import (
    Style,
    format_count,
    format_duration,
    format_labelled_rows,
    format_number,
    format_plural,
    format_rate,
)
from launcher.system.run_files import (
    BEST_MODEL_FILE,
    CHECKPOINTS_DIR,
    EVENTS_FILE,
    LOGS_DIR,
    METRICS_FILE,
    MODEL_FILE,
    TENSORBOARD_DIR,
    WANDB_DIR,
)
from launcher.telemetry.free_cores import has_free_cores
from launcher.telemetry.sinks.running_stats import RunningStats, StageShare
from launcher.telemetry.sinks.start_summary import Facts, LabelledText

__all__ = [
    "describe_bottleneck",
    "format_closing_lines",
    "format_speed",
    "format_stage_table",
    "make_unapplied_rows",
    "suggest_next_steps",
]

CYAN, MAGENTA, YELLOW, BLUE, GREEN, GREY = 36, 35, 33, 34, 32, 90
STAGE_COLOURS = {
    "data": YELLOW,
    "transfer": YELLOW,
    "forward": CYAN,
    "backward": CYAN,
    "sync": MAGENTA,
    "optimizer": BLUE,
}
BAR_COLUMNS = 36
DOMINANT_SHARE = 0.5
LISTED_FILES = (MODEL_FILE, BEST_MODEL_FILE, CHECKPOINTS_DIR, METRICS_FILE, EVENTS_FILE, LOGS_DIR, WANDB_DIR)

STAGE_ADVICE = {
    "data": "workers wait for data. Try data.num_workers=2 or more",
    "transfer": "copying batches to the device. Try a larger batch.per_device",
    "sync": "workers wait for each other. Synchronise less often: larger batch.per_device or batch.accumulation",
    "optimizer": "the optimizer step. A larger batch takes fewer steps per epoch",
    "checkpoint": "saving checkpoints. Try a longer checkpoint.every",
    "other": "validation and work between updates. Try a longer train.validate_every",
}


def format_closing_lines(stats: RunningStats, facts: Facts, done: Facts, style: Style, width: int) -> list[str]:
    """Return the blocks of the summary, each preceded by a blank line; blocks without content are omitted.

    `done` holds the fields of the `done` event; it is empty if training was stopped early.
    """
    blocks = (
        format_labelled_rows(
            [
                *_make_metric_rows(stats, done.get("metrics") or {}),
                *_make_noise_rows(stats),
                *_make_restart_rows(stats, done),
                *make_unapplied_rows(done),
            ],
            width,
            style,
        ),
        _format_stages(stats, facts, style, width),
        format_labelled_rows(_make_file_rows(facts, finished=bool(done)), width, style),
    )
    return [line for block in blocks if block for line in ("", *block)]


def format_speed(samples: int, updates: int, seconds: float, samples_per_s: float | None) -> str:
    """Format totals, e.g. 14,370 samples · 230 updates · 14.2 s · 1,012 samples/s."""
    parts = [f"{format_count(samples)} samples", f"{format_count(updates)} updates", format_duration(seconds)]
    return " · ".join([*parts, *([f"{format_rate(samples_per_s)} samples/s"] if samples_per_s else [])])


def format_stage_table(stages: Sequence[StageShare], style: Style, width: int) -> list[str]:
    """One line per stage: name, milliseconds per update, share and a bar; `stages` is sorted, longest first."""
    longest = max((stage.share for stage in stages), default=1.0)
    columns = max(0, min(BAR_COLUMNS, width - 34))
    slowest_ms = max((stage.ms for stage in stages), default=0.0)
    digits = 1 if slowest_ms >= 10 else 2 if slowest_ms >= 1 else 3
    lines = []
    for stage in stages:
        bar = "█" * round(columns * stage.share / longest)
        line = f"  {stage.stage:<11}{stage.ms:>9,.{digits}f} ms {stage.share:>6.1%}"
        lines.append(f"{line}  {style(bar, STAGE_COLOURS.get(stage.stage, GREY))}" if bar else line[:width])
    return lines


def describe_bottleneck(stages: Sequence[StageShare], facts: Facts) -> str:
    """The stage that takes longest (forward and backward count together), and one suggestion to reduce it."""
    grouped: dict[str, float] = {}
    for stage in stages:
        name = "compute" if stage.stage in ("forward", "backward") else stage.stage
        grouped[name] = grouped.get(name, 0.0) + stage.share
    name, share = max(grouped.items(), key=lambda item: item[1])
    if name == "compute":
        verdict = "as it should be" if share >= DOMINANT_SHARE else "the largest part"
        return f"compute, {share:.0%}, {verdict}. Faster: {_suggest_speedup(facts)}"
    return f"{name}, {share:.0%}: {STAGE_ADVICE.get(name, 'the longest stage')}"


def suggest_next_steps(facts: Facts, finished: bool) -> list[str]:
    """Commands that continue training, sync to W&B or open TensorBoard; only those that apply to this run."""
    folder = Path(str(facts.get("run_dir") or "."))
    key = f"run.name={folder.name}" if folder.parent.name == "runs" else f"run.dir={folder}"
    steps = [
        f"to continue: {key} and a longer train.duration" if finished else f"to continue: the same command with {key}"
    ]
    if any(folder.glob(f"{WANDB_DIR}/offline-run-*")):
        steps.append(f"wandb sync {folder}/{WANDB_DIR}/offline-run-*")
    if (folder / TENSORBOARD_DIR).is_dir():
        steps.append(f"tensorboard --logdir {folder}/{TENSORBOARD_DIR}")
    return steps


def _make_metric_rows(stats: RunningStats, metrics: Mapping[str, float]) -> list[LabelledText]:
    last = {**stats.values, **metrics}
    validated = sorted((key for key in last if key.startswith("val/")), key=lambda key: ("loss" not in key, key))
    keys = [key for key in ("train/loss", *validated) if last.get(key) is not None]
    return [(key.replace("/", " "), _format_metric(key, last[key], stats)) for key in keys]


def _make_noise_rows(stats: RunningStats) -> list[LabelledText]:
    """The gradient noise scale next to the batch size, if measured; otherwise its lower bound, if known."""
    # Only the last row counts: an estimate that is no longer valid is not shown.
    values = {} if stats.last is None else stats.last.values
    scale, low, high = (values.get(f"noise/scale{end}") for end in ("", "_low", "_high"))
    if low is None:
        return []
    if scale is None or high is None:
        samples = f"at least {format_number(low)} samples"
    else:
        samples = f"{format_number(scale)} samples ({format_number(low)} to {format_number(high)})"
    return [("noise scale", f"{samples} · batch {format_number(values['batch/global'])}")]


def _make_restart_rows(stats: RunningStats, done: Facts) -> list[LabelledText]:
    """The cost of restarts: over the whole run if `done` has it, else since this process started."""
    restarts, lost_samples = done.get("restarts", 0), done.get("lost_samples", stats.lost_samples)
    parts = []
    if restarts:
        parts.append(f"{format_plural(restarts, 'restart')} took {format_duration(done.get('recovery_s', 0.0))}")
    if lost_samples:
        parts.append(f"{format_count(lost_samples)} samples were run again")
    return [("lost", ", ".join(parts))] if parts else []


def make_unapplied_rows(facts: Facts) -> list[LabelledText]:
    """The updates that took no step: their gradient was not finite, or their samples had no target."""
    skipped, empty, scale = (facts.get(name) for name in ("skipped_updates", "empty_updates", "loss_scale"))
    rows = []
    if skipped:
        why = "the gradient was NaN or infinite"
        if scale:
            why = f"the gradient overflowed in fp16, whose loss scale is {format_number(scale)} now"
        rows.append(f"{format_plural(skipped, 'update')} took no step: {why}")
    if empty:
        rows.append(f"{format_plural(empty, 'update')} took no step: their samples had no target")
    return [("skipped" if not index else "", row) for index, row in enumerate(rows)]


def _format_metric(key: str, value: float, stats: RunningStats) -> str:
    best = stats.best.get(key)
    if best is None or format_number(best.value) == format_number(value):
        return format_number(value)
    return f"{format_number(value)} (best {format_number(best.value)} at update {format_count(best.update)})"


def _format_stages(stats: RunningStats, facts: Facts, style: Style, width: int) -> list[str]:
    stages = stats.compute_stage_shares()
    if not stages:
        return []
    total = format_number(sum(stage.ms for stage in stages))
    heading = f"  time per update: {total} ms (mean of {format_count(stats.updates)} updates)"
    bottleneck = format_labelled_rows([("bottleneck", describe_bottleneck(stages, facts))], width, style)
    return [style.dim(heading[:width]), *format_stage_table(stages, style, width), *bottleneck]


def _make_file_rows(facts: Facts, finished: bool) -> list[LabelledText]:
    if not facts.get("run_dir"):
        return []
    steps = suggest_next_steps(facts, finished)
    folder = Path(str(facts["run_dir"]))
    files = ", ".join(name for name in LISTED_FILES if (folder / name).exists())
    return [
        ("files", f"{folder}: {files}" if files else str(folder)),
        ("next", steps[0]),
        *(("", step) for step in steps[1:]),
    ]


def _suggest_speedup(facts: Facts) -> str:
    if str(facts.get("device", "cpu")).startswith("cpu"):
        return "more workers or a GPU" if has_free_cores(facts) else "a GPU or more machines"
    if facts.get("precision") == "fp32":
        return "train.precision=bf16"
    return "more workers"
