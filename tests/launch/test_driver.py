"""The driver: the exact torchrun argument list, and how results are interpreted."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.schema import ElasticConfig, LaunchConfig, RunConfig, TrainConfig
from launcher.distributed.commands import make_torchrun_command, probe_command
from launcher.distributed.worker_env import num_threads, resolve_num_workers, user_omp_threads
from launcher.errors import UsageError
from launcher.launch.driver import describe_killed
from launcher.run_dir import failures
from launcher.system.gpus import count_gpus
from launcher.telemetry.sinks.jsonl import append_line


def test_the_command_letter_by_letter() -> None:
    config = RunConfig(launch=LaunchConfig(threads=2, env={"OWN": "1"}))
    made = make_torchrun_command(config, 3, Path("/private/handover.json"), Path("/private/failures.json"))
    assert made.argv == (
        *(sys.executable, "-m", "launcher.launch.torchrun_agent", "--failures=/private/failures.json"),
        *("--nnodes=1", "--nproc-per-node=3", "--max-restarts=1000000"),
        *("--local-addr=127.0.0.1", "--monitor-interval=0.1"),
        *("-m", "launcher", "worker", "/private/handover.json"),
    )
    assert made.env == {
        "OMP_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OWN": "1",
    }


def test_what_measures_is_one_process_on_the_loopback() -> None:
    made = probe_command(RunConfig(launch=LaunchConfig(threads=2, env={"OWN": "1"})), 3, Path("HANDOVER.json"))
    assert made.format_shell_line() == (
        "OMP_NUM_THREADS=2 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo OWN=1 "
        f"{shlex.quote(sys.executable)} -m launcher probe --nproc-per-node=3 HANDOVER.json"
    )


def test_threads_are_the_cores_over_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    for workers in (1, 2, 64):
        env = make_torchrun_command(RunConfig(), workers, Path("h"), Path("f")).env
        assert env["OMP_NUM_THREADS"] == str(max(1, cores // workers))


def test_threads_are_those_of_the_users_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver sets OMP_NUM_THREADS for its workers; under the user's torchrun, torchrun sets it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    handed = make_torchrun_command(RunConfig(), 1, Path("h"), Path("f")).env
    assert handed["OMP_NUM_THREADS"] == "5"
    assert num_threads(RunConfig(), 1, handed) == 5
    typed = RunConfig(launch=LaunchConfig(threads=3))
    assert make_torchrun_command(typed, 1, Path("h"), Path("f")).env["OMP_NUM_THREADS"] == "3"
    assert num_threads(typed, 1, handed) == 3
    assert num_threads(replace(RunConfig(), elastic=ElasticConfig(exact=True)), 1, handed) == 1
    for senseless in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", senseless)
        assert user_omp_threads(RunConfig()) == {}


def test_a_command_can_be_typed_again() -> None:
    made = make_torchrun_command(RunConfig(launch=LaunchConfig(env={"A": "b c"})), 1, Path("a b"), Path("f"))
    assert "'A=b c'" in made.format_shell_line()
    assert made.format_shell_line().endswith("launcher worker 'a b'")


def gpus(tmp_path: Path, number: int) -> Path:
    for index in range(number):
        (tmp_path / f"0000:0{index}:00.0").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "counted"),
    [(None, 4), ("", 0), ("0,1", 2), ("2", 1), ("0,7,1", 1), ("-1", 0), ("GPU-a,GPU-b", 2), ("0, 1 ,2", 3)],
)
def test_gpus_are_counted_as_cuda_reads_them(tmp_path: Path, visible: str | None, counted: int) -> None:
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(env, gpus(tmp_path, 4)) == counted


def test_a_machine_without_a_driver_has_none(tmp_path: Path) -> None:
    assert count_gpus({}, tmp_path / "nothing") == 0


def test_workers_are_what_is_asked_for_else_one_per_gpu_else_one() -> None:
    assert resolve_num_workers(RunConfig(launch=LaunchConfig(workers=5))) == 5
    assert resolve_num_workers(RunConfig(train=TrainConfig(device="cpu"))) == 1


# --- failure messages ---------------------------------------------------------------------------------------------


def failed(logs: Path, rank: int, message: str, generation: int = 1) -> failures.RankFailure:
    return failures.write_failure(logs, rank, generation, RuntimeError(message), logs / f"rank{rank}.log")


def test_the_first_real_error_is_shown_not_its_consequences(tmp_path: Path) -> None:
    """The peer of a dead rank may record its error first, because it needs no unwinding; it is not the cause."""
    failed(tmp_path, 0, "[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:21936")
    failed(tmp_path, 1, "boom")
    failed(tmp_path, 1, "another", generation=2)
    found = failures.first_failure(tmp_path, since=1)
    assert found is not None
    assert (found.rank, found.message) == (1, "boom")


def test_what_an_earlier_job_left_is_not_this_jobs_error(tmp_path: Path) -> None:
    failed(tmp_path, 0, "old", generation=1)
    assert failures.first_failure(tmp_path, since=2) is None


def test_a_consequence_is_better_than_nothing(tmp_path: Path) -> None:
    failed(tmp_path, 0, "Connection closed by peer")
    found = failures.first_failure(tmp_path, since=1)
    assert found is not None
    assert "Connection closed" in found.summary()


def test_what_ended_one_start_is_its_first_real_error(tmp_path: Path) -> None:
    failed(tmp_path, 0, "another", generation=1)
    failed(tmp_path, 0, "Connection closed by peer", generation=2)
    assert failures.root_cause(tmp_path, 2) is None, "nobody who could still say why"
    failed(tmp_path, 1, "boom", generation=2)
    found = failures.root_cause(tmp_path, 2)
    assert found is not None
    assert found.message == "boom"


def test_an_error_is_among_the_events_once(tmp_path: Path) -> None:
    events, found = tmp_path / "events.jsonl", failed(tmp_path, 1, "boom")
    assert not failures.is_logged(events, found)
    append_line(events, found.to_event())
    assert failures.is_logged(events, found)
    assert not failures.is_logged(events, failed(tmp_path, 1, "boom", generation=2))
    assert not failures.is_logged(events, failed(tmp_path, 0, "boom"))


def test_an_event_is_added_behind_what_a_kill_cut_off(tmp_path: Path) -> None:
    events, found = tmp_path / "events.jsonl", failed(tmp_path, 1, "boom")
    events.write_text('{"event": "start", "rank": 0}\n{"event": "err')
    append_line(events, found.to_event())
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "error"]


def test_a_half_written_word_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "error-g1-r0.json").write_text('{"rank": 0')
    assert failures.first_failure(tmp_path, since=1) is None


def test_a_wrong_request_is_its_own_line(tmp_path: Path) -> None:
    found = failures.write_failure(tmp_path, 0, 1, UsageError("seed=x is no number"), tmp_path / "log")
    assert (found.summary(), found.status, found.is_fatal) == ("seed=x is no number", 2, True)


def test_secrets_are_masked_in_last_words(tmp_path: Path) -> None:
    found = failed(tmp_path, 0, "cannot reach https://user:hunter2@host/data?token=abc")
    assert "hunter2" not in (text := (tmp_path / "error-g1-r0.json").read_text() + found.summary())
    assert "token=abc" not in text


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({"1": -9, "0": -15}, "rank 1 was killed by SIGKILL: out of memory?"),
        ({"0": -11}, "rank 0 was killed by SIGSEGV"),
        ({"3": 7}, "rank 3 exited with code 7"),
        (None, "torchrun ended without reporting an error"),
    ],
)
def test_a_worker_that_left_no_word_is_named_by_its_exit(tmp_path: Path, codes: object, said: str) -> None:
    report = tmp_path / "failures.json"
    if codes is not None:
        report.write_text(json.dumps(codes))
    assert describe_killed(report) == said


def test_a_failure_is_one_line_whatever_its_text(tmp_path: Path) -> None:
    found = replace(failed(tmp_path, 0, "one\ntwo\n\tthree"), where="own.py:3")
    assert "\n" not in found.summary()


def test_a_real_error_comes_before_the_consequence_of_an_earlier_one(tmp_path: Path) -> None:
    failed(tmp_path, 0, "Connection closed by peer")
    failures.write_failure(tmp_path, 1, 2, RuntimeError("boom"), tmp_path / "log")
    found = failures.first_failure(tmp_path, since=1)
    assert found is not None
    assert "boom" in found.summary()
