"""Console output: a summary, a progress bar on a terminal or plain lines elsewhere, and a final summary."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.system.formatting import (
    Style,
    format_clock,
    format_count,
    format_duration,
    format_number,
    format_shares,
    wrap_text,
)
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks.console import ConsoleSink
from launcher.telemetry.sinks.final_summary import describe_bottleneck, format_closing_lines, format_stage_table
from launcher.telemetry.sinks.running_stats import RunningStats, StageShare

START: Mapping[str, Any] = {
    "run_dir": "runs/resnet-1",
    "recipe": "resnet",
    "data": {"train": 1437, "val": 360},
    "parameters": 174970,
    "trainable": 1290,
    "strategy": "ddp",
    "device": "cpu",
    "device_name": "Some Processor",
    "precision": "fp32",
    "world": 2,
    "nodes": 1,
    "threads": 1,
    "seed": 0,
    "duration_samples": 14370,
    "updates": 230,
    "updates_per_epoch": 22.453125,
    "backend": "gloo",
    "generation": 1,
    "optimizer": "SGD",
    "decay": "cosine",
}
PLAN: Mapping[str, Any] = {
    "policy": "hold",
    "global": 256,
    "shares": [86, 85, 85],
    "per_device": 43,
    "accumulation": 2,
    "world": 3,
    "lr": 0.1,
    "lr_scale": 1.0,
    "lr_base_batch": 256,
    "warmup_samples": 1437,
    "why": None,
    "from": None,
}
STAGES_MS = {"data": 2.0, "forward": 10.0, "backward": 20.0, "sync": 6.0, "other": 2.0}


def reading(update: int, **values: float) -> MetricsRow:
    stages = {f"stage/{stage}/ms": ms for stage, ms in STAGES_MS.items()}
    row = {"train/loss": 2.0 / update, "lr/value": 0.1, **stages, **values}
    return MetricsRow(1000 + update * 0.04, 64 * update, update, (64 * update) // 1437, 2, 1, row)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class File(io.StringIO):
    encoding = "utf-8"


def shown(stream: io.StringIO, *entries: MetricsRow | Event, env: Mapping[str, str] | None = None) -> str:
    console = ConsoleSink(stream, env or {})
    for entry in entries:
        console.write(entry)
    console.close()
    return stream.getvalue()


def event(name: str, facts: Mapping[str, Any]) -> Event:
    return Event(1000.0, name, facts)


def a_run(updates: int = 230) -> list[MetricsRow | Event]:
    rows = [
        reading(update, **({"val/loss": 1 / update, "val/accuracy": update / 231} if update % 23 == 0 else {}))
        for update in range(1, updates + 1)
    ]
    facts = {"samples": 14370, "updates": 230, "seconds": 9.2, "metrics": {"val/loss": 0.0043, "val/accuracy": 0.99}}
    return [event("start", START), event("plan", PLAN), *rows, event("done", facts)]


def test_the_start_says_what_will_be_trained_on_what_and_how() -> None:
    text = shown(File(), event("start", START), event("plan", PLAN))
    assert text.splitlines() == [
        "",
        "resnet on 2 workers",
        "  data       1,437 samples to train on, 360 to validate",
        "  model      174,970 parameters · 1,290 of them trained · fp32 · ddp",
        "  device     cpu · Some Processor · gloo · 1 thread per worker",
        "  length     14,370 samples = 230 updates, 22.45 per epoch",
        "  optimizer  SGD · cosine decay",
        "  folder     runs/resnet-1",
        "  batch      256 = 3 workers x (86, 85x2) in 2 micro-batches",
        "  lr         0.1 (x1 of 0.1 at 256) · warmup 1,437 samples (1 epoch)",
    ]


def test_facts_that_are_absent_leave_no_gap() -> None:
    text = shown(File(), event("start", {"recipe": "mlp", "world": 1}))
    assert text.splitlines() == ["", "mlp on 1 worker"]


def test_a_new_plan_is_one_readable_line() -> None:
    later = {**PLAN, "from": {"global": 128, "lr": 0.05}, "why": "batch.ramp"}
    text = shown(File(), event("plan", later))
    assert " ".join(text.split()) == (
        "plan 128 -> 256 = 3 workers x (86, 85x2) in 2 micro-batches · lr 0.1 (x1 of 0.1 at 256) · batch.ramp"
    )


def test_plain_lines_are_few() -> None:
    text = shown(File(), event("start", START), *(reading(update) for update in range(1, 1001)))
    lines = [line for line in text.splitlines() if "update" in line and "%" in line]
    assert len(lines) == 8  # 40 s of training, one in five seconds
    assert re.search(r"update 126 +loss 0.0159 +1,600 samples/s  0:04 left  lr 0.1", text)


def test_every_validation_has_its_line() -> None:
    text = shown(File(), *a_run())
    assert len(re.findall(r"update \d+ .*val loss \S+ +val accuracy", text)) == 10


def test_nothing_is_wider_than_80_columns_and_a_file_gets_no_colours() -> None:
    text = shown(File(), *a_run())
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "\r" not in text


def test_the_end_says_what_was_reached_where_the_time_went_and_what_to_type(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "resnet-1"
    (folder / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    (folder / "model.safetensors").touch()
    _, *rest = a_run()
    text = shown(File(), event("start", {**START, "run_dir": str(folder)}), *rest)
    end = text[text.index("finished") :]
    assert "finished 14,370 samples · 230 updates · 9.2 s · 1,600 samples/s" in end
    assert re.search(r"val accuracy +0.99 \(best 0.9957 at update 230\)", end)
    assert "time per update: 40 ms (mean of 227 updates)" in end
    assert re.search(r"backward +20.0 ms +50.0%  █{36}\n +forward +10.0 ms +25.0%  █{18}\n", end)
    assert "bottleneck  compute, 75%, as it should be. Faster: more workers or a GPU" in end
    joined = "".join(end.split())
    assert "model.safetensors,wandb" in joined
    assert "tocontinue:run.name=resnet-1andalongertrain.duration" in joined
    assert f"wandbsync{folder}/wandb/offline-run-*" in joined


def test_a_largest_part_that_is_small_is_not_called_as_it_should_be() -> None:
    stages = [StageShare("forward", 4.0, 0.4), StageShare("other", 3.5, 0.35), StageShare("data", 2.5, 0.25)]
    assert (
        describe_bottleneck(stages, {"device": "cpu"})
        == "compute, 40%, the largest part. Faster: more workers or a GPU"
    )


def test_the_end_says_what_restarts_cost_in_the_whole_run() -> None:
    """Includes those of earlier processes, whose rows this process never saw."""
    cost = {"samples": 14370, "updates": 230, "restarts": 12, "recovery_s": 54.2, "lost_samples": 803}
    text = shown(File(), *a_run()[:-1], event("done", cost))
    assert re.search(r"lost +12 restarts took 54.2 s, 803 samples were run again", text)


def test_a_polite_stop_says_how_to_go_on() -> None:
    stop = event("preempt", {"why": "SIGUSR1", "samples": 1280, "update": 20})
    text = shown(File(), *a_run(20)[:-1], stop)
    assert "stopped at update 20, 1,280 samples · SIGUSR1 · saved, nothing is lost" in text
    assert "to continue: the same command with run.name=resnet-1" in text
    assert "bottleneck" in text


@pytest.mark.parametrize(
    ("name", "facts", "line"),
    [
        ("alarm", {"kind": "not_finite", "detail": "rank 1: NaN"}, "warning: rank 1: NaN"),
        (
            "resize",
            {"from": {"world": 3, "global": 256, "lr": 0.1}, "to": {"world": 2, "global": 128, "lr": 0.05}, "why": "x"},
            "resize 3 -> 2 workers · batch 256 -> 128 · lr 0.1 -> 0.05",
        ),
        (
            "target",
            {"metric": "val/accuracy", "value": 0.9512, "samples": 8622, "update": 9, "seconds": 75.0},
            "target val accuracy 0.9512 reached after 1:15, 8,622 samples",
        ),
        ("checkpoint", {"name": "u9", "seconds": 4.2, "bytes": 1.2e9}, "checkpoint u9 took 4.2 s (1.2 GB)"),
    ],
)
def test_events_are_one_line_each(name: str, facts: Mapping[str, Any], line: str) -> None:
    assert shown(File(), event(name, facts)) == line + "\n"


def test_a_quick_checkpoint_and_unknown_events_are_quiet() -> None:
    quick = event("checkpoint", {"name": "u9", "seconds": 0.1, "bytes": 1000})
    assert shown(File(), quick, event("novelty", {"a": 1})) == ""


def test_a_resume_names_the_checkpoints_that_were_passed_over() -> None:
    damaged = [{"name": "u120", "why": "sha256 differs"}]
    facts = {"checkpoint": "u100", "update": 100, "passed_over": damaged, "changed": {"data.num_workers": [0, 2]}}
    facts["lost_samples"] = 1280
    text = shown(File(), event("resume", facts))
    assert "warning: checkpoint u120 was skipped: sha256 differs" in text
    assert "resumed u100 at update 100 · 1,280 samples are run again · data.num_workers 0 -> 2" in " ".join(
        text.split()
    )


def test_a_terminal_gets_a_bar_a_few_times_a_second() -> None:
    text = shown(Terminal(), event("start", START), *(reading(update) for update in range(1, 101)))  # 4 s
    bars = [part for part in text.split("\r") if "━" in part]
    assert 14 <= len(bars) <= 20
    last = re.sub(r"\x1b\[[0-9;]*[mK]", "", bars[-1])
    assert re.search(r"━+─+  4\d%  epoch 5/10  0:0\d left  loss 0.02\d+  1,600/s", last)
    assert len(last) < 80


def test_colours_only_on_a_terminal_and_not_with_no_color() -> None:
    assert "\x1b[2m" in shown(Terminal(), event("start", START))
    assert "\x1b[2m" not in shown(Terminal(), event("start", START), env={"NO_COLOR": "1"})


def test_a_stream_without_unicode_gets_ascii() -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

    shown(stream := Ascii(), event("start", {"recipe": "größe", "world": 2}), *a_run())
    stream.getvalue().encode("ascii")
    assert "###" in stream.getvalue()


@pytest.mark.parametrize("columns", [30, 50, 80, 200])
def test_nothing_wraps_on_a_narrow_terminal(columns: int) -> None:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    text = b""
    with open(slave, "w", encoding="utf-8") as stream:
        console = ConsoleSink(stream, {"NO_COLOR": "1"})
        for entry in a_run(100):
            console.write(entry)
            text += _waiting(master)
        console.close()
        text += _waiting(master)
    os.close(master)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[mK]", "", text.decode()))
    assert max(map(len, lines)) <= min(columns, 80)


def _waiting(master: int) -> bytes:
    try:
        return os.read(master, 1 << 20)
    except BlockingIOError:
        return b""


def test_the_first_updates_are_left_out_of_the_stages_where_there_are_enough() -> None:
    long, short = RunningStats(), RunningStats()
    for update in range(1, 21):
        warm_up = {"stage/forward/ms": 1000.0} if update <= 3 else {}
        long.add(reading(update, **warm_up))
        if update <= 5:
            short.add(reading(update, **warm_up))
    assert next(stage.ms for stage in long.compute_stage_shares() if stage.stage == "forward") == 10.0
    assert next(stage.ms for stage in short.compute_stage_shares() if stage.stage == "forward") == 604.0
    assert sum(stage.share for stage in long.compute_stage_shares()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("data", "data.num_workers=2"),
        ("sync", "batch.accumulation"),
        ("optimizer", "larger batch"),
        ("checkpoint", "checkpoint.every"),
        ("other", "train.validate_every"),
        ("transfer", "batch.per_device"),
        ("forward", "bf16"),
    ],
)
def test_each_bottleneck_has_one_piece_of_advice(stage: str, advice: str) -> None:
    stages = [StageShare(stage, 70.0, 0.7), StageShare("backward" if stage == "forward" else "forward", 30.0, 0.3)]
    text = describe_bottleneck(stages, {"device": "cuda", "precision": "fp32"})
    assert text.startswith("compute, 100%" if stage == "forward" else f"{stage}, 70%")
    assert advice in text


def test_a_stage_table_without_stages_is_empty() -> None:
    assert format_stage_table([], Style(False), 80) == []


def test_a_run_that_ends_before_its_first_row_still_ends_well() -> None:
    text = shown(File(), event("done", {"samples": 0, "updates": 0, "seconds": 0.0, "metrics": {}}))
    assert text.splitlines()[1].startswith("finished 0 samples")


def test_numbers_read_well() -> None:
    assert [format_number(value) for value in (0.0213456, 12.5, 1437.2, 1.2e-5, 0.1, float("nan"))] == [
        "0.0213", "12.5", "1,437", "1.2e-05", "0.1", "nan",
    ]  # fmt: skip
    assert [format_clock(seconds) for seconds in (9, 75, 3723, 90000)] == ["0:09", "1:15", "1:02:03", "1d 1:00:00"]
    assert [format_duration(seconds) for seconds in (0.5, 14.21, 75)] == ["0.5 s", "14.2 s", "1:15"]
    assert format_count(1437) == "1,437"
    assert [format_shares(parts) for parts in ([32, 32], [86, 85, 85], [1])] == ["32", "(86, 85x2)", "1"]
    assert format_shares([9, 8, 7, 6, 5, 4, 3]) == "(9, 8, 7, 6, 5, …)"
    assert wrap_text("a bb ccc", 4, 2) == ["a bb ccc"]


@pytest.mark.parametrize(
    ("noise", "line"),
    [
        ({"scale": 312.4, "scale_low": 280.0, "scale_high": 350.0}, "312.4 samples (280 to 350) · batch 64"),
        ({"scale_low": 280.0}, "at least 280 samples · batch 64"),
        ({}, None),
    ],
)
def test_the_noise_scale_stands_beside_the_batch_at_the_end(noise: Mapping[str, float], line: str | None) -> None:
    stats = RunningStats()
    values = {"batch/global": 64, "train/loss": 1.0, **{f"noise/{key}": value for key, value in noise.items()}}
    stats.add(MetricsRow(time=0.0, samples=64, update=1, epoch=0, world=1, generation=1, values=values))
    said = "\n".join(format_closing_lines(stats, {}, {}, Style(False), 80))
    assert (line in said) if line else ("noise" not in said)
