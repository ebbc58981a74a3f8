"""The wandb sink: what it wrote is read back, and training never waits for it.

Each run is a process of its own, since wandb keeps state for the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.telemetry.records import MetricsRow
from launcher.telemetry.sinks.rate_limit import RowRateLimiter
from launcher.telemetry.sinks.wandb import is_reachable
from tests.helpers import wandb_file
from tests.helpers.wandb_server import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # a real wandb service is started

NOWHERE = "http://127.0.0.1:9"
KEY = "0123456789abcdef0123456789abcdef01234567"

#: argv: the run folder, the first update, the last, the last event; then it waits for a line on stdin and closes.
PROGRAM = """
import sys, time
from pathlib import Path
from launcher.telemetry.records import MetricsRow
from launcher.telemetry.sinks import SinkContext, open_sinks
from launcher.telemetry.metrics_logger import MetricsLogger


folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = {"batch.per_device": 32, "lr.base": 0.1}
logger = MetricsLogger(open_sinks({"wandb": {"tags": ["a"]}}, SinkContext(folder, "my-run", "run1234", config)))
logger.log_event("start", world=2)
for update in range(first, last + 1):
    values = {"train/loss": 1 / update, "stage/data/ms": 1.5, "stage/data/share": 0.1, "stage/data/samples_per_s": 9.0}
    logger.log_metrics(MetricsRow(1000.0 + update, 64 * update, update, 0, 2, 1, values))
logger.log_event(sys.argv[4], samples=64 * last)
sys.stdin.readline()
start = time.monotonic()
logger.close()
print(time.monotonic() - start, flush=True)
"""


def start(folder: Path, first: int, last: int, env: Mapping[str, str], ends: str = "done") -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    source = str(Path(__file__).parents[3])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(first), str(last), ends],
        env={**clean, "HOME": str(home), "PYTHONPATH": source, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, first: int, last: int, **env: str) -> tuple[float, list[str]]:
    """Return the seconds that closing took, and the messages."""
    process = start(folder, first, last, env)
    out, err = process.communicate("close\n", timeout=60)
    assert process.returncode == 0, err
    return float(out), err.splitlines()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/*run-*/run-run1234.wandb"))


def updates(rows: list[dict[str, Any]]) -> list[int]:
    return [row["update"] for row in rows]


def run_record(path: Path) -> Any:
    return next(record.run for record in wandb_file.records(path) if record.HasField("run"))


def test_without_a_key_it_goes_offline_with_one_line_and_writes_everything(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, said = run(folder, 1, 40)
    how = f"wandb sync {folder}/wandb/offline-run-*"
    assert said == [f"wandb: offline, no API key; to upload later: {how}"]

    (path,) = files(folder)
    rows = wandb_file.rows(path)
    assert updates(rows) == list(range(1, 41))
    last = {key: rows[-1][key] for key in ("samples", "stage/data/ms", "stage/data/share", "stage/data/samples_per_s")}
    assert last == {"samples": 2560, "stage/data/ms": 1.5, "stage/data/share": 0.1, "stage/data/samples_per_s": 9.0}
    assert rows[0]["_timestamp"] == 1001.0

    (metric,) = [record.metric for record in wandb_file.records(path) if record.HasField("metric")]
    assert (metric.glob_name, metric.step_metric) == ("*", "samples")
    assert wandb_file.summary(path)["event/start"]["world"] == 2
    assert wandb_file.summary(path)["event/done"]["samples"] == 2560

    record = run_record(path)
    config = {item.key or "/".join(item.nested_key): item.value_json for item in record.config.update}
    assert (record.run_id, record.display_name, list(record.tags)) == ("run1234", "my-run", ["a"])
    assert (config["batch.per_device"], config["lr.base"]) == ("32", "0.1")
    assert not list(folder.glob("wandb/*run-*/files/requirements.txt"))
    assert not list(folder.glob("wandb/*run-*/files/wandb-metadata.json"))


def test_a_restart_goes_on_with_the_same_run_and_later_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, 1, 5, WANDB_MODE="offline")
    run(folder, 6, 9, WANDB_MODE="offline")
    found = [(run_record(path).run_id, [row["_step"] for row in wandb_file.rows(path)]) for path in files(folder)]
    assert sorted(found, key=lambda one: one[1]) == [("run1234", [1, 2, 3, 4, 5]), ("run1234", [6, 7, 8, 9])]


@pytest.mark.parametrize(("ends", "code"), [("done", 0), ("preempt", 0), ("error", 1), ("alarm", 1)])
def test_a_run_whose_other_rank_died_has_not_finished(tmp_path: Path, ends: str, code: int) -> None:
    process = start(tmp_path / "run", 1, 2, {}, ends)
    process.communicate("close\n", timeout=60)
    [written] = files(tmp_path / "run")
    assert wandb_file.exit_code(written) == code


def test_wandb_mode_is_obeyed(tmp_path: Path) -> None:
    _, said = run(tmp_path / "off", 1, 3, WANDB_MODE="disabled")
    assert said == []
    assert not (tmp_path / "off" / "wandb").exists()
    _, said = run(tmp_path / "offline", 1, 3, WANDB_MODE="offline", WANDB_API_KEY=KEY, WANDB_BASE_URL=NOWHERE)
    assert said == []
    assert len(files(tmp_path / "offline")) == 1


def test_with_a_key_but_no_answer_it_goes_offline_with_one_line_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, 1, 20, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": NOWHERE})
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said.startswith(f"wandb: offline, no response from {NOWHERE}; to upload later: wandb sync")
    out, err = process.communicate("close\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert float(out) < 2
    (path,) = files(folder)
    assert updates(wandb_file.rows(path)) == list(range(1, 21))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20


def test_a_key_that_cannot_be_one_is_named_and_never_shown(tmp_path: Path) -> None:
    _, said = run(tmp_path / "run", 1, 3, WANDB_API_KEY="abc123", WANDB_BASE_URL=NOWHERE)
    (line,) = said
    assert line.startswith("wandb: offline, WANDB_API_KEY invalid")
    assert "abc123" not in line
    assert len(files(tmp_path / "run")) == 1


def test_a_server_that_answers_gets_everything_before_the_end(tmp_path: Path) -> None:
    with serving() as server:
        process = start(tmp_path / "run", 1, 20, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url})
        assert process.stderr is not None
        assert process.stderr.readline() == f"wandb: {server.url}/someone/launcher/runs/run1234\n"
        _, more = process.communicate("close\n", timeout=60)
        assert not more
        assert updates(server.rows()) == list(range(1, 21))
        assert server.streamed[-1]["complete"] is True


def test_a_server_that_goes_away_costs_two_seconds_and_the_rest_waits_on_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with serving() as server:
        process = _begun(server, folder)
    out, err = process.communicate("close\n", timeout=60)
    assert process.returncode == 0
    assert float(out) < 2.5
    assert err.splitlines() == [f"wandb: no response from the server; to upload later: wandb sync {folder}/wandb/run-*"]
    (path,) = files(folder)
    assert updates(wandb_file.rows(path)) == list(range(1, 21))


def _begun(server: Server, folder: Path) -> subprocess.Popen[str]:
    process = start(folder, 1, 20, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url})
    assert process.stderr is not None
    assert process.stderr.readline().startswith(f"wandb: {server.url}")
    assert server.begun.wait(30)
    return process


def test_any_answer_is_an_answer() -> None:
    with serving() as server:
        assert is_reachable(server.url, 5)
        assert is_reachable(f"{server.url}/nothing/here", 5)
    assert not is_reachable(server.url, 5)
    assert not is_reachable("no address", 5)


def test_a_fast_run_is_thinned_but_keeps_validations_restarts_and_its_last_row() -> None:
    thinner, kept = RowRateLimiter(rows_per_s=1), []
    for update in range(1, 20):  # eight updates a second
        values: dict[str, float] = {7: {"val/loss": 1.0}, 12: {"elastic/lost_samples": 64.0}}.get(
            update, {"lr/value": 1.0}
        )
        row = MetricsRow(update / 8, update, update, 0, 1, 1, values)
        kept += [update] if thinner.accept(row) else []
    assert kept == [1, 7, 9, 12, 17]
    last = thinner.get_held_row()
    assert last is not None
    assert last.update == 19
    assert thinner.get_held_row() is None


def test_a_row_that_passed_passes_again_when_it_is_tried_again() -> None:
    thinner, row = RowRateLimiter(), MetricsRow(1.0, 1, 1, 0, 1, 1, {})
    assert thinner.accept(row)
    assert thinner.accept(row)
    assert not thinner.accept(MetricsRow(1.01, 2, 2, 0, 1, 1, {}))


def test_a_slow_run_keeps_every_row() -> None:
    thinner = RowRateLimiter(rows_per_s=5)
    assert all(thinner.accept(MetricsRow(update * 0.25, update, update, 0, 1, 1, {})) for update in range(100))


def test_tensorboard_files_hold_the_rows(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from launcher.telemetry.records import Event
    from launcher.telemetry.sinks.tensorboard import TensorboardSink

    sink = TensorboardSink(tmp_path)
    for update in (1, 2, 3):
        sink.write(MetricsRow(1000.0 + update, 64 * update, update, 0, 2, 1, {"train/loss": 1 / update}))
    sink.write(Event(1004.0, "done", {"samples": 192}))
    sink.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(scalar.step, scalar.wall_time) for scalar in found.Scalars("train/loss")] == [
        (64, 1001.0),
        (128, 1002.0),
        (192, 1003.0),
    ]
    assert json.dumps(found.Tags()["tensors"]) == '["event/done/text_summary"]'
