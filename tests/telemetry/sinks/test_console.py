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

from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks.console import ConsoleSink

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


def make_row(update: int, **values: float) -> MetricsRow:
    stages = {f"stage/{stage}/ms": ms for stage, ms in STAGES_MS.items()}
    row = {"train/loss": 2.0 / update, "lr/value": 0.1, **stages, **values}
    return MetricsRow(1000 + update * 0.04, 64 * update, update, (64 * update) // 1437, 2, 1, row)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class File(io.StringIO):
    encoding = "utf-8"


def render(stream: io.StringIO, *entries: MetricsRow | Event, env: Mapping[str, str] | None = None) -> str:
    console = ConsoleSink(stream, env or {})
    for entry in entries:
        console.write(entry)
    console.close()
    return stream.getvalue()


def make_event(name: str, facts: Mapping[str, Any]) -> Event:
    return Event(1000.0, name, facts)


def make_run(updates: int = 230) -> list[MetricsRow | Event]:
    rows = [
        make_row(update, **({"val/loss": 1 / update, "val/accuracy": update / 231} if update % 23 == 0 else {}))
        for update in range(1, updates + 1)
    ]
    facts = {"samples": 14370, "updates": 230, "seconds": 9.2, "metrics": {"val/loss": 0.0043, "val/accuracy": 0.99}}
    return [make_event("start", START), make_event("plan", PLAN), *rows, make_event("done", facts)]


def test_start_summary_names_modules_in_eval_mode() -> None:
    text = render(File(), make_event("start", {**START, "in_eval_mode": ["backbone", "neck", "head.0"]}))
    assert "1,290 of them trained · backbone and 2 more in eval mode · fp32 · ddp" in " ".join(text.split())


def test_start_summary_lists_the_run() -> None:
    text = render(File(), make_event("start", START), make_event("plan", PLAN))
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


def test_start_summary_omits_missing_facts() -> None:
    text = render(File(), make_event("start", {"recipe": "mlp", "world": 1}))
    assert text.splitlines() == ["", "mlp on 1 worker"]


def test_new_plan_is_one_line() -> None:
    later = {**PLAN, "from": {"global": 128, "lr": 0.05}, "why": "batch.ramp"}
    text = render(File(), make_event("plan", later))
    assert " ".join(text.split()) == (
        "plan 128 -> 256 = 3 workers x (86, 85x2) in 2 micro-batches · lr 0.1 (x1 of 0.1 at 256) · batch.ramp"
    )


def test_plain_output_is_rate_limited() -> None:
    text = render(File(), make_event("start", START), *(make_row(update) for update in range(1, 1001)))
    lines = [line for line in text.splitlines() if "update" in line and "%" in line]
    assert len(lines) == 8  # 40 s of training, one in five seconds
    assert re.search(r"update 126 +loss 0.0159 +1,600 samples/s  0:04 left  lr 0.1", text)


def test_every_validation_prints_a_line() -> None:
    text = render(File(), *make_run())
    assert len(re.findall(r"update \d+ .*val loss \S+ +val accuracy", text)) == 10


def test_file_output_fits_80_columns_without_colours() -> None:
    text = render(File(), *make_run())
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "\r" not in text


def test_final_summary_shows_results_stages_and_commands(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "resnet-1"
    (folder / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    (folder / "model.safetensors").touch()
    _, *rest = make_run()
    text = render(File(), make_event("start", {**START, "run_dir": str(folder)}), *rest)
    end = text[text.index("finished") :]
    assert "finished 14,370 samples · 230 updates · 9.2 s · 1,600 samples/s" in end
    assert re.search(r"val accuracy +0.99 \(best 0.9957 at update 230\)", end)
    assert "time per update: 40 ms (mean of 227 updates)" in end
    assert re.search(r"backward +20.0 ms +50.0%  █{36}\n +forward +10.0 ms +25.0%  █{18}\n", end)
    assert "bottleneck  compute, 75%, as it should be. Faster: a GPU or more machines" in end
    joined = "".join(end.split())
    assert "model.safetensors,wandb" in joined
    assert "tocontinue:run.name=resnet-1andalongertrain.duration" in joined
    assert f"wandbsync{folder}/wandb/offline-run-*" in joined


def test_final_summary_totals_restart_costs() -> None:
    """Includes those of earlier processes, whose rows this process never saw."""
    cost = {"samples": 14370, "updates": 230, "restarts": 12, "recovery_s": 54.2, "lost_samples": 803}
    text = render(File(), *make_run()[:-1], make_event("done", cost))
    assert re.search(r"lost +12 restarts took 54.2 s, 803 samples were run again", text)


def test_stop_summary_says_how_to_continue() -> None:
    stop = make_event("preempt", {"why": "SIGUSR1", "samples": 1280, "update": 20})
    text = render(File(), *make_run(20)[:-1], stop)
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
    assert render(File(), make_event(name, facts)) == line + "\n"


def test_quick_checkpoints_and_unknown_events_are_silent() -> None:
    quick = make_event("checkpoint", {"name": "u9", "seconds": 0.1, "bytes": 1000})
    assert render(File(), quick, make_event("novelty", {"a": 1})) == ""


def test_resume_names_skipped_checkpoints() -> None:
    damaged = [{"name": "u120", "why": "sha256 differs"}]
    facts = {"checkpoint": "u100", "update": 100, "passed_over": damaged, "changed": {"data.num_workers": [0, 2]}}
    facts["lost_samples"] = 1280
    text = render(File(), make_event("resume", facts))
    assert "warning: checkpoint u120 was skipped: sha256 differs" in text
    assert "resumed u100 at update 100 · 1,280 samples are run again · data.num_workers 0 -> 2" in " ".join(
        text.split()
    )


def test_terminal_progress_bar_is_rate_limited() -> None:
    text = render(Terminal(), make_event("start", START), *(make_row(update) for update in range(1, 101)))  # 4 s
    bars = [part for part in text.split("\r") if "━" in part]
    assert 14 <= len(bars) <= 20
    last = re.sub(r"\x1b\[[0-9;]*[mK]", "", bars[-1])
    assert re.search(r"━+─+  4\d%  epoch 5/10  0:0\d left  loss 0.02\d+  1,600/s", last)
    assert len(last) < 80


def test_colours_require_terminal_without_no_color() -> None:
    assert "\x1b[2m" in render(Terminal(), make_event("start", START))
    assert "\x1b[2m" not in render(Terminal(), make_event("start", START), env={"NO_COLOR": "1"})


def test_stream_without_unicode_gets_ascii() -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

    render(stream := Ascii(), make_event("start", {"recipe": "größe", "world": 2}), *make_run())
    stream.getvalue().encode("ascii")
    assert "###" in stream.getvalue()


@pytest.mark.parametrize("columns", [30, 50, 80, 200])
def test_output_never_wraps_on_narrow_terminal(columns: int) -> None:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    text = b""
    with open(slave, "w", encoding="utf-8") as stream:
        console = ConsoleSink(stream, {"NO_COLOR": "1"})
        for entry in make_run(100):
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


def test_run_without_rows_has_final_summary() -> None:
    text = render(File(), make_event("done", {"samples": 0, "updates": 0, "seconds": 0.0, "metrics": {}}))
    assert text.splitlines()[1].startswith("finished 0 samples")
