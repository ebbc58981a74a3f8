"""`launcher explain`: what limits a run, why one run is slower than another, and what to try."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.analysis.explain import compare_runs, explain_run, format_explanation
from launcher.analysis.run_profile import compute_profile
from launcher.cli.main import main
from launcher.run_dir.metrics_reader import read_run_metrics
from launcher.telemetry.stages import STAGES
from tests.helpers.written_runs import DEFAULT_STAGES_MS, make_row, write_run

SLOW_DATA = {**DEFAULT_STAGES_MS, "data": 40.0}


def explain_folder(folder: Path) -> dict[str, Any]:
    return explain_run(compute_profile(read_run_metrics(str(folder))))


def compare_folders(one: Path, other: Path) -> dict[str, Any]:
    return compare_runs(*(compute_profile(read_run_metrics(str(folder))) for folder in (one, other)))


def write_jittered_run(
    folder: Path, stages_ms: Mapping[str, float] = DEFAULT_STAGES_MS, updates: int = 60, **values: Any
) -> Path:
    """Updates that vary a little, like real ones."""
    draw, rows = random.Random(folder.name), []
    for update in range(1, updates + 1):
        jitter = draw.gauss(1, 0.01)
        rows.append(make_row(update, {stage: ms * jitter for stage, ms in stages_ms.items()}, **values))
    return write_run(folder, rows)


def find_advice(document: Mapping[str, Any], words: str) -> str:
    """Return the only advice that contains these words."""
    [line] = [line for line in document["advice"] if words in line]
    return str(line)


# --- one run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_dominant_stage_is_named_with_share(tmp_path: Path, stage: str) -> None:
    document = explain_folder(write_jittered_run(tmp_path / "run", {**DEFAULT_STAGES_MS, stage: 48.0}))
    assert document["bottleneck"] == stage
    assert document["share"] == pytest.approx(
        48 / (48 + sum(DEFAULT_STAGES_MS.values()) - DEFAULT_STAGES_MS.get(stage, 0)), rel=0.01
    )
    assert document["advice"]
    assert sum(each["share"] for each in document["stages"].values()) == pytest.approx(1.0)


def test_advice_states_measured_values(tmp_path: Path) -> None:
    document = explain_folder(write_jittered_run(tmp_path / "run", SLOW_DATA))
    assert document["samples_per_s"] == pytest.approx(64 / 55 * 1e3, rel=0.02)
    line = find_advice(document, "data.num_workers")
    assert re.match(r"each update waits (39|40)\S* ms for data; without that wait throughput could reach 4,2\d\d", line)


def test_small_stages_get_no_advice(tmp_path: Path) -> None:
    document = explain_folder(write_jittered_run(tmp_path / "run", SLOW_DATA))
    assert not [line for line in document["advice"] if "optimizer" in line or "other workers" in line]


def test_warmup_updates_after_each_start_are_excluded(tmp_path: Path) -> None:
    """The first updates include compilation and are excluded."""
    compiling = {**DEFAULT_STAGES_MS, "forward": 20_000.0}
    rows = [make_row(update, compiling if update in (1, 2, 31) else DEFAULT_STAGES_MS) for update in range(1, 31)]
    rows += [
        make_row(update, compiling if update == 31 else DEFAULT_STAGES_MS, generation=2) for update in range(31, 61)
    ]
    document = explain_folder(write_run(tmp_path / "run", rows))
    assert document["bottleneck"] == "backward"
    assert document["stages"]["forward"]["ms"] == pytest.approx(4.0)
    assert document["left_out"] == 16


def test_superseded_rows_are_not_counted(tmp_path: Path) -> None:
    rows = [make_row(update, SLOW_DATA) for update in range(1, 41)]
    rows += [make_row(update, DEFAULT_STAGES_MS, generation=2) for update in range(2, 41)]
    assert explain_folder(write_run(tmp_path / "run", rows))["bottleneck"] == "backward"


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_short_run_is_explained(tmp_path: Path, updates: int) -> None:
    folder = write_jittered_run(tmp_path / "run", SLOW_DATA, updates=updates)
    assert explain_folder(folder)["bottleneck"] == "data"
    assert "data" in format_explanation(explain_folder(folder))
    assert compare_folders(folder, folder)["within_spread"]


def test_rows_are_weighted_by_their_updates(tmp_path: Path) -> None:
    """log.every=10, plus a row for a single update before a validation."""
    rows = [make_row(update) for update in range(10, 210, 10)]
    rows += [make_row(201, {"other": 160.0}), make_row(210)]
    stages = explain_folder(write_run(tmp_path / "run", rows))["stages"]
    assert stages["other"]["ms"] == pytest.approx(160 / 150)  # 15 of 21 groups of ten updates are kept


def test_run_without_stage_times_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [{"update": 1, "samples": 8, "train/loss": 1.0}])
    assert main(["explain", str(tmp_path / "run")]) == 2
    assert "has no stage times" in capsys.readouterr().err


def test_utilization_separates_overhead_from_compute(tmp_path: Path) -> None:
    idle = explain_folder(write_jittered_run(tmp_path / "idle", device__utilization=0.2))
    line = find_advice(idle, "forward and backward")
    assert "the device is busy for only 20 % of the time: overhead per micro-batch" in line
    busy = explain_folder(write_jittered_run(tmp_path / "busy", device__utilization=0.95))
    assert "compute is the bottleneck" in find_advice(busy, "forward and backward")


def test_critical_rank_is_named(tmp_path: Path) -> None:
    ranks = {"stage__rank": 1, "stage__data__ms_max": 40.0, "stage__data__ms_min": 0.5}
    assert "wait for rank 1: its data takes 40 ms, the fastest rank's 0.5 ms" in find_advice(
        explain_folder(write_jittered_run(tmp_path / "run", SLOW_DATA, **ranks)), "the others"
    )
    alternating = [make_row(update, SLOW_DATA, **{**ranks, "stage__rank": update % 2}) for update in range(1, 50)]
    assert not [
        line for line in explain_folder(write_run(tmp_path / "fair", alternating))["advice"] if "the others" in line
    ]


def test_allocator_retries_are_reported(tmp_path: Path) -> None:
    rows = [make_row(update, memory__alloc_retries=update // 10) for update in range(1, 61)]
    assert "ran out of memory and retried 5 times" in find_advice(
        explain_folder(write_run(tmp_path / "run", rows)), "allocator"
    )


def test_noise_is_reported_only_if_measured(tmp_path: Path) -> None:
    assert "noise_dominated" not in explain_folder(write_jittered_run(tmp_path / "unknown"))
    noisy = explain_folder(write_jittered_run(tmp_path / "noisy", noise__scale_low=640.0))
    assert noisy["noise_dominated"] is True
    assert "at least 10 times the batch size of 64; the loss varies by" in find_advice(noisy, "noise scale")
    calm = explain_folder(write_jittered_run(tmp_path / "calm", noise__scale=80.0, noise__scale_low=40.0))
    assert calm["noise_dominated"] is False
    assert not [line for line in calm["advice"] if "noise" in line]


def test_restarts_and_resizes_are_reported_with_cost(tmp_path: Path) -> None:
    rows = [make_row(update, world=1, batch=32, samples=update * 32) for update in range(1, 41)]
    restart = {"elastic__recovery_s": 8.5, "elastic__lost_samples": 96}
    rows += [
        make_row(update, generation=2, samples=1280 + 64 * (update - 40), **(restart if update == 41 else {}))
        for update in range(41, 91)
    ]
    document = explain_folder(write_run(tmp_path / "run", rows))
    assert "restarts took 8.5 s, and 96 samples" in find_advice(document, "restarts")
    assert "from 1 to 2 workers, samples/s went from 2,000 to 4,000: scaling efficiency 100 %" in find_advice(
        document, "workers, s"
    )


# --- two runs -----------------------------------------------------------------------------------------------------


def test_comparison_names_faster_run_and_grown_stage(tmp_path: Path) -> None:
    fast, slow = write_jittered_run(tmp_path / "fast"), write_jittered_run(tmp_path / "slow", SLOW_DATA)
    document = compare_folders(fast, slow)
    assert (document["faster"], document["grew"], document["bottleneck"]) == ("A", "data", "data")
    assert document["ratio"] == pytest.approx(55 / 16, rel=0.02)
    assert document["why"].endswith("100 % of the difference")
    swapped = compare_folders(slow, fast)
    assert (swapped["faster"], swapped["grew"]) == ("B", "data")
    assert swapped["ratio"] == pytest.approx(document["ratio"])


def test_different_batches_compare_by_time_per_sample(tmp_path: Path) -> None:
    """Batch 45 against 20: each update is longer, but only the backward pass takes longer per sample."""
    small = write_jittered_run(tmp_path / "20", {"forward": 4.0, "backward": 8.0, "data": 2.0}, batch=20)
    large = write_jittered_run(tmp_path / "45", {"forward": 9.0, "backward": 40.0, "data": 3.0}, batch=45)
    document = compare_folders(large, small)
    assert (document["faster"], document["grew"]) == ("B", "backward")
    assert document["grew_ms_per_sample"] == pytest.approx(40 / 45 - 8 / 20, rel=0.01)


def test_difference_within_spread_counts_as_equal(tmp_path: Path) -> None:
    document = compare_folders(
        write_jittered_run(tmp_path / "a"), write_jittered_run(tmp_path / "b", {**DEFAULT_STAGES_MS, "data": 1.01})
    )
    assert document["ratio"] >= 1
    assert document["within_spread"] is True
    assert "equally fast" in document["why"]


def test_comparison_computes_scaling_efficiency(tmp_path: Path) -> None:
    one = write_jittered_run(tmp_path / "one", {"forward": 4.0, "backward": 8.0}, batch=32, world=1)
    four = write_jittered_run(tmp_path / "four", {"forward": 4.0, "backward": 8.0, "sync": 3.0}, batch=128, world=4)
    document = compare_folders(one, four)
    assert document["scaling_efficiency"] == pytest.approx(12 / 15, rel=0.01)
    assert "Scaling efficiency: 80 %" in format_explanation(document)
    held = write_jittered_run(tmp_path / "held", {"forward": 1.0, "backward": 2.0, "sync": 1.0}, batch=32, world=4)
    assert compare_folders(one, held)["scaling_efficiency"] == pytest.approx(3 / 4, rel=0.01)
    other = write_jittered_run(tmp_path / "other", {"forward": 4.0, "backward": 8.0, "sync": 3.0}, batch=1000, world=4)
    assert "scaling_efficiency" not in compare_folders(one, other), "the batch differs too"


# --- the command -----------------------------------------------------------------------------------------------------


def test_json_is_one_document_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments are paths even if they contain `=`."""
    folder = write_jittered_run(tmp_path / "lr=0.1", SLOW_DATA)
    assert main(["explain", str(folder), "format=json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"bottleneck", "share", "why", "advice", "stages"} <= document.keys()
    assert main(["explain", str(folder), str(folder), "format=json"]) == 0
    assert {"faster", "ratio", "grew"} <= json.loads(capsys.readouterr().out).keys()


def test_text_fits_80_columns_with_hostile_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_jittered_run(tmp_path / name, SLOW_DATA) for name in ("\x1b[31mred\n", "long " * 30)]
    assert main(["explain", *map(str, folders)]) == 0
    assert main(["explain", str(folders[0])]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "type launcher explain RUN"),
        (["nowhere"], "nowhere is not a run"),
        (["nowhere", "format=xml"], "format=xml is not an option of explain: it takes format=json"),
        (["nowhere", "-o", "x"], "-o is not an option of explain"),
        (["a", "b", "c"], "type launcher explain RUN"),
    ],
)
def test_usage_error_is_one_line(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_unreadable_lines_are_reported_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_jittered_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("nonsense\n" + (folder / "metrics.jsonl").read_text())
    assert main(["explain", str(folder), "format=json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["bottleneck"] == "backward"
    assert "1 unreadable lines were skipped" in captured.err


def test_explain_imports_no_torch(tmp_path: Path) -> None:
    folder = write_jittered_run(tmp_path / "run")
    code = f"import sys; from launcher.cli.main import main; main(['explain', {str(folder)!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "numpy", "yaml"} & set(done.stdout.split())


# --- data loading, memory, and targets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "words"),
    [(0.9, "uses the CPU for 90 %"), (0.1, "waits for storage"), (0.55, "raise data.num_workers; run")],
)
def test_data_advice_separates_decoding_from_storage(tmp_path: Path, busy: float, words: str) -> None:
    document = explain_folder(write_jittered_run(tmp_path / "run", SLOW_DATA, data__loader_cpu=busy))
    assert words in find_advice(document, "ms for data")


def test_major_faults_mean_memory_is_full(tmp_path: Path) -> None:
    rows = [make_row(update, memory__major_faults=7 * update) for update in range(1, 61)]
    assert "reads 7 pages" in find_advice(explain_folder(write_run(tmp_path / "thrashes", rows)), "from disk")
    rows = [make_row(update, memory__major_faults=900) for update in range(1, 61)]
    assert not [line for line in explain_folder(write_run(tmp_path / "warm", rows))["advice"] if "disk" in line]


def test_comparison_names_run_that_reached_target_sooner(tmp_path: Path) -> None:
    """B has twice the samples/s but needs three times the samples: A gets there in two thirds of the time."""
    for name, seconds, samples in (("a", 20.0, 10_000), ("b", 30.0, 30_000)):
        write_jittered_run(tmp_path / name)
        target = {"metric": "val/accuracy", "value": 0.95, "samples": samples, "update": samples // 50}
        done = {"samples": samples, "updates": 0, "seconds": seconds, "target": {**target, "seconds": seconds}}
        (tmp_path / name / "done.json").write_text(json.dumps(done))
    found = compare_folders(tmp_path / "a", tmp_path / "b")
    assert found["target"]["sooner"] == "A"
    assert found["target"]["ratio"] == pytest.approx(1.5)
    assert found["target"]["throughput_ratio"] == pytest.approx(0.5)
    assert found["target"]["samples_ratio"] == pytest.approx(3.0)
    message = format_explanation(found)
    assert "A reached val/accuracy 0.95 sooner: in 20 s, 10,000 samples and 200 updates" in " ".join(message.split())
    assert max(map(len, message.splitlines())) <= 80


def test_comparison_omits_target_unless_shared(tmp_path: Path) -> None:
    assert "target" not in compare_folders(write_jittered_run(tmp_path / "a"), write_jittered_run(tmp_path / "b"))
