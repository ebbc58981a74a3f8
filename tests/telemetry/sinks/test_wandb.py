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

from launcher.telemetry.sinks.wandb import is_reachable
from tests.helpers import wandb_file
from tests.helpers.jobs import wait_for
from tests.helpers.wandb_server import Server, run_server

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # a real wandb service is started


NOWHERE = "http://127.0.0.1:9"


KEY = "0123456789abcdef0123456789abcdef01234567"


#: argv: the run directory, the first update, the last, the last event; then it waits for a line on stdin and closes.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
from launcher.telemetry.records import MetricsRow
from launcher.telemetry.sinks import SinkContext, open_sinks
from launcher.telemetry.metrics_logger import MetricsLogger
from launcher.telemetry.wandb_env import get_wandb_run_id
from launcher.run_dir.run_directory import RunDirectory


folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = {"batch.per_device": 32, "lr.base": 0.1}
options = json.loads(os.environ.get("OPTIONS", '{"tags": ["a"]}'))
run_id = RunDirectory(folder).ensure_wandb_id(get_wandb_run_id() or "run1234")
logger = MetricsLogger(open_sinks({"wandb": options}, SinkContext(folder, "my-run", run_id, config)))
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


def start_program(
    folder: Path, first: int, last: int, env: Mapping[str, str], ends: str = "done"
) -> subprocess.Popen[str]:
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


def run_program(folder: Path, first: int, last: int, **env: str) -> tuple[float, list[str]]:
    """Return the seconds that closing took, and the messages."""
    process = start_program(folder, first, last, env)
    out, err = process.communicate("close\n", timeout=60)
    assert process.returncode == 0, err
    return float(out), err.splitlines()


def find_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/*run-*/run-run1234.wandb"))


def get_updates(rows: list[dict[str, Any]]) -> list[int]:
    return [row["update"] for row in rows]


def run_record(path: Path) -> Any:
    return next(record.run for record in wandb_file.read_records(path) if record.HasField("run"))


def test_missing_key_goes_offline_and_writes_everything(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _, messages = run_program(folder, 1, 40)
    how = f"wandb sync {folder}/wandb/offline-run-*"
    assert messages == [f"wandb: offline, no API key; to upload later: {how}"]

    (path,) = find_files(folder)
    rows = wandb_file.read_rows(path)
    assert get_updates(rows) == list(range(1, 41))
    last = {key: rows[-1][key] for key in ("samples", "stage/data/ms", "stage/data/share", "stage/data/samples_per_s")}
    assert last == {"samples": 2560, "stage/data/ms": 1.5, "stage/data/share": 0.1, "stage/data/samples_per_s": 9.0}
    assert rows[0]["_timestamp"] == 1001.0

    (metric,) = [record.metric for record in wandb_file.read_records(path) if record.HasField("metric")]
    assert (metric.glob_name, metric.step_metric) == ("*", "samples")
    assert wandb_file.read_summary(path)["event/start"]["world"] == 2
    assert wandb_file.read_summary(path)["event/done"]["samples"] == 2560

    record = run_record(path)
    config = {item.key or "/".join(item.nested_key): item.value_json for item in record.config.update}
    assert (record.run_id, record.display_name, list(record.tags)) == ("run1234", "my-run", ["a"])
    assert (config["batch.per_device"], config["lr.base"]) == ("32", "0.1")
    assert not list(folder.glob("wandb/*run-*/files/requirements.txt"))
    assert not list(folder.glob("wandb/*run-*/files/wandb-metadata.json"))


NAMED = {"WANDB_PROJECT": "vision", "WANDB_NAME": "ada", "WANDB_RUN_GROUP": "g", "WANDB_TAGS": "b,c"}


def describe(record: Any) -> tuple[str, ...]:
    return (record.project, record.display_name, record.entity, record.run_group, *record.tags)


def test_environment_names_the_run_and_its_folder(tmp_path: Path) -> None:
    """What no key sets is left to wandb's own variables; WANDB_DIR need not exist."""
    elsewhere = tmp_path / "elsewhere" / "deep"
    given = {**NAMED, "WANDB_ENTITY": "team", "WANDB_NOTES": "why", "WANDB_DIR": str(elsewhere), "OPTIONS": "{}"}
    _, messages = run_program(tmp_path / "run", 1, 2, **given)
    assert messages == [
        f"wandb: offline, no API key; to upload later: wandb sync {elsewhere}/wandb/offline-run-*-run1234"
    ]
    [path] = find_files(elsewhere)
    assert not (tmp_path / "run" / "wandb").exists()
    record = run_record(path)
    assert describe(record) == ("vision", "ada", "team", "g", "b", "c")
    assert record.notes == "why"


def test_keys_win_over_the_environment(tmp_path: Path) -> None:
    options = {"project": "mine", "name": "own", "entity": "me", "group": "other", "tags": ["x"]}
    run_program(tmp_path / "run", 1, 2, **NAMED, WANDB_ENTITY="team", OPTIONS=json.dumps(options))
    [path] = find_files(tmp_path / "run")
    assert describe(run_record(path)) == ("mine", "own", "me", "other", "x")


def test_run_of_a_sweep_has_the_id_of_its_agent(tmp_path: Path) -> None:
    """As `wandb agent` sets them. The folder's wandb-id is the id that was used."""
    parameters = tmp_path / "config.yaml"
    parameters.write_text("wandb_version: 1\nlr.base:\n  value: 0.1\n")
    agent = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "abc12345", "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    run_program(tmp_path / "run", 1, 2, **agent, WANDB_MODE="offline")
    [path] = (tmp_path / "run").glob("wandb/*run-*/*.wandb")
    record = run_record(path)
    assert (record.run_id, record.sweep_id) == ("abc12345", "s1")
    assert (tmp_path / "run" / "wandb-id").read_text() == "abc12345"


@pytest.mark.parametrize("wanted", [True, False])
def test_system_metrics_are_on_unless_turned_off(tmp_path: Path, wanted: bool) -> None:
    """Metadata of the machine, of git and of the code are not sent in either case."""
    options = json.dumps({} if wanted else {"system_metrics": False})
    env = {"OPTIONS": options, "WANDB_MODE": "offline", "WANDB__STATS_SAMPLING_INTERVAL": "0.1"}
    folder = tmp_path / "run"
    process = start_program(folder, 1, 2, env)
    wait_for(lambda: bool(find_files(folder)))
    wait_for(lambda: ("stats" if wanted else "history") in list_record_kinds(folder))
    process.communicate("close\n", timeout=60)
    assert ("stats" in list_record_kinds(folder)) == wanted
    assert "environment" not in list_record_kinds(folder)
    assert not list(folder.glob("wandb/*run-*/files/*"))


def list_record_kinds(folder: Path) -> set[str]:
    [path] = find_files(folder)
    return {record.WhichOneof("record_type") for record in wandb_file.read_records(path)}


def test_restart_continues_same_run_and_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_program(folder, 1, 5, WANDB_MODE="offline")
    run_program(folder, 6, 9, WANDB_MODE="offline")
    found = [
        (run_record(path).run_id, [row["_step"] for row in wandb_file.read_rows(path)]) for path in find_files(folder)
    ]
    assert sorted(found, key=lambda one: one[1]) == [("run1234", [1, 2, 3, 4, 5]), ("run1234", [6, 7, 8, 9])]


@pytest.mark.parametrize(("ends", "code"), [("done", 0), ("preempt", 0), ("error", 1), ("alarm", 1)])
def test_exit_code_follows_last_event(tmp_path: Path, ends: str, code: int) -> None:
    process = start_program(tmp_path / "run", 1, 2, {}, ends)
    process.communicate("close\n", timeout=60)
    [written] = find_files(tmp_path / "run")
    assert wandb_file.read_exit_code(written) == code


def test_wandb_mode_is_obeyed(tmp_path: Path) -> None:
    _, messages = run_program(tmp_path / "off", 1, 3, WANDB_MODE="disabled")
    assert messages == []
    assert not (tmp_path / "off" / "wandb").exists()
    _, messages = run_program(
        tmp_path / "offline", 1, 3, WANDB_MODE="offline", WANDB_API_KEY=KEY, WANDB_BASE_URL=NOWHERE
    )
    assert messages == []
    assert len(find_files(tmp_path / "offline")) == 1


def test_unreachable_server_goes_offline_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_program(folder, 1, 20, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": NOWHERE})
    assert process.stderr is not None
    messages = process.stderr.readline()
    assert messages.startswith(f"wandb: offline, no response from {NOWHERE}; to upload later: wandb sync")
    out, err = process.communicate("close\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    offline_s, _ = run_program(tmp_path / "offline", 1, 20, WANDB_MODE="offline")
    assert float(out) < 2 * offline_s + 2, "closing waited for a server that does not answer"
    (path,) = find_files(folder)
    assert get_updates(wandb_file.read_rows(path)) == list(range(1, 21))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20


def test_invalid_key_is_reported_but_not_shown(tmp_path: Path) -> None:
    _, messages = run_program(tmp_path / "run", 1, 3, WANDB_API_KEY="abc123", WANDB_BASE_URL=NOWHERE)
    (line,) = messages
    assert line.startswith("wandb: offline, WANDB_API_KEY invalid")
    assert "abc123" not in line
    assert len(find_files(tmp_path / "run")) == 1


def test_reachable_server_gets_everything(tmp_path: Path) -> None:
    with run_server() as server:
        process = start_program(tmp_path / "run", 1, 20, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url})
        assert process.stderr is not None
        assert process.stderr.readline() == f"wandb: {server.url}/someone/launcher/runs/run1234\n"
        _, more = process.communicate("close\n", timeout=60)
        assert not more
        assert get_updates(server.rows()) == list(range(1, 21))
        assert server.streamed[-1]["complete"] is True


def test_lost_server_delays_close_by_two_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_server() as server:
        process = start_connected_program(server, folder)
    out, err = process.communicate("close\n", timeout=60)
    offline_s, _ = run_program(tmp_path / "offline", 1, 20, WANDB_MODE="offline")
    assert process.returncode == 0
    assert float(out) < 2 * offline_s + 2.5
    assert err.splitlines() == [f"wandb: no response from the server; to upload later: wandb sync {folder}/wandb/run-*"]
    (path,) = find_files(folder)
    assert get_updates(wandb_file.read_rows(path)) == list(range(1, 21))


def start_connected_program(server: Server, folder: Path) -> subprocess.Popen[str]:
    process = start_program(folder, 1, 20, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url})
    assert process.stderr is not None
    assert process.stderr.readline().startswith(f"wandb: {server.url}")
    assert server.started.wait(30)
    return process


def test_any_http_response_counts_as_reachable() -> None:
    with run_server() as server:
        assert is_reachable(server.url, 5)
        assert is_reachable(f"{server.url}/nothing/here", 5)
    assert not is_reachable(server.url, 5)
    assert not is_reachable("no address", 5)
