"""When a machine counts as busy, and that other processes are really seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from quiet_machine import Calibration, CpuClock, CpuUse, Limits, calibrate, find_disturbances

QUIET = CpuUse(wall_s=10.0, cores=2, busy_s=16.1, steal_s=0.02, own_s=16.0)
STEADY = Calibration(wall_s=0.101, cpu_s=0.1)


def judge(calibration: Calibration = STEADY, use: CpuUse = QUIET, best_cpu_s: float = 0.1) -> list[str]:
    return find_disturbances([STEADY, calibration, STEADY], [QUIET, use], best_cpu_s, Limits())


def test_quiet_machine_is_not_disturbed() -> None:
    assert judge() == []


@pytest.mark.parametrize(
    ("calibration", "use", "named"),
    [
        (Calibration(0.120, 0.1), QUIET, "waited for its core: 1.20"),
        (Calibration(0.113, 0.112), QUIET, "took 1.12 of its best CPU time"),
        (STEADY, CpuUse(10.0, 2, 16.8, 0.0, 16.0), "other processes used 4.0%"),
        (STEADY, CpuUse(10.0, 2, 16.0, 0.5, 16.0), "the hypervisor took 2.5%"),
    ],
)
def test_one_disturbed_run_or_calibration_is_enough(calibration: Calibration, use: CpuUse, named: str) -> None:
    (found,) = judge(calibration, use)
    assert named in found


def test_whole_slow_machine_is_seen_by_a_better_calibration_of_another_time() -> None:
    assert judge(best_cpu_s=0.1) == []
    assert "took 1.25 of its best" in judge(best_cpu_s=0.08)[0]


def test_counted_ticks_may_be_fewer_than_the_jobs_own_time() -> None:
    assert CpuUse(10.0, 2, busy_s=15.9, steal_s=0.0, own_s=16.0).other_share == 0


@pytest.fixture
def burner() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


def read_cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def test_cpu_time_of_another_process_counts_as_others(burner: subprocess.Popen[bytes]) -> None:
    clock, begin_s = CpuClock(), read_cpu_s(burner.pid)
    while read_cpu_s(burner.pid) - begin_s < 0.3:
        time.sleep(0.02)
    use = clock.read()
    assert use.other_share * use.wall_s * use.cores >= 0.25
    assert use.own_s < 0.25


def test_cpu_time_of_a_finished_child_counts_as_own() -> None:
    clock = CpuClock()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert clock.read().own_s >= 0.29


def test_calibration_measures_the_work_of_one_core() -> None:
    small, large = calibrate(cores=1, blocks=5), calibrate(cores=1, blocks=40)
    assert 0 < small.cpu_s < large.cpu_s / 2
