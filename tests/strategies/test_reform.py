"""Workers that lose one in the middle of an update go on without it, take in a new one, and lose and take in others.

The processes and their connections are real; see `reform_cases`, whose results are checked here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.jobs import make_env
from tests.helpers.reform_cases import CASES, LOST, NEW

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[1] / "helpers/reform_cases.py"
Outcomes = dict[int, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """By worker and case; worker LOST is killed in the last case and has none."""
    folder = tmp_path_factory.mktemp("reform")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = {
        worker: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(store.port), str(worker)]
            + (["killed"] if worker == NEW else list(CASES)),
            env=make_env(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"),
            stdout=(folder / f"{worker}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for worker in (0, 1, 2, NEW)
    }
    try:
        statuses = {worker: process.wait(timeout=600) for worker, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    logs = "\n".join(f"{worker}:\n" + (folder / f"{worker}.log").read_text()[-3000:] for worker in processes)
    assert statuses == {0: 0, 1: -signal.SIGKILL, 2: 0, NEW: 0}, logs
    return {worker: json.loads((folder / f"{worker}.json").read_text()) for worker in (0, 2, NEW)}


@pytest.mark.parametrize("case", CASES)
class TestSurvivors:
    def test_update_in_flight_leaves_nothing_behind(self, outcomes: Outcomes, case: str) -> None:
        for worker in (0, 2):
            result = outcomes[worker][case]
            assert result["error"] not in ("AssertionError", "TrainingFailed"), case
            assert result["kept"], "parameters, moments and buffers are those before the update"
            assert result["dropped"], "no parameter has a gradient"
            assert result["same optimizer"]

    def test_old_group_and_the_wrapper_in_it_are_freed(self, outcomes: Outcomes, case: str) -> None:
        """At once, without the garbage collector: others may wait in the group."""
        for worker in (0, 2):
            assert outcomes[worker][case]["freed"] == [True] * (2 if case == "exact" else 4)

    def test_replica_that_is_dropped_is_freed(self, outcomes: Outcomes, case: str) -> None:
        for worker in (0, 2):
            assert outcomes[worker][case]["dropped replica is freed with 2"]

    def test_result_is_bitwise_that_of_a_restart_at_the_update(self, outcomes: Outcomes, case: str) -> None:
        assert all(outcomes[worker][case]["equal to a restart with 2"] for worker in (0, 2))
        assert outcomes[0][case]["equal to a restart with 1"]

    def test_noise_is_measured_in_the_groups_of_the_new_world(self, outcomes: Outcomes, case: str) -> None:
        two, one = ([2, 2], [4]) if case == "exact" else ([1, 1], [2])
        assert outcomes[0][case]["groups with 2"] == two
        assert outcomes[0][case]["groups with 1"] == one

    def test_new_worker_has_the_same_state_and_trains_on(self, outcomes: Outcomes, case: str) -> None:
        workers = (0, 2, NEW) if case == "killed" else (0, 2)
        assert len({outcomes[worker][case]["joined"] for worker in workers}) == 1

    def test_from_two_to_one_and_back(self, outcomes: Outcomes, case: str) -> None:
        assert outcomes[0][case]["end"] == outcomes[2][case]["end"]
        assert outcomes[0][case]["no hooks"], "the hooks of a single worker are gone"


def test_exact_run_is_bitwise_that_which_nothing_disturbed(outcomes: Outcomes) -> None:
    assert outcomes[0]["exact"]["end"] == outcomes[0]["alone"]["end"]


def test_lost_worker_was_killed(outcomes: Outcomes) -> None:
    assert LOST not in outcomes
    assert outcomes[0]["killed"]["error"] == "RuntimeError"
