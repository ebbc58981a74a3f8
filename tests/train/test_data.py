"""CPU utilisation of data loading."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from launcher.system.processes import read_cpu_seconds
from launcher.train.data import LoaderCpuUsage


def test_loader_cpu_share_separates_computing_from_waiting() -> None:
    loading = LoaderCpuUsage()
    assert loading.measure_share() is None, "nothing was loaded"
    with loading:
        end_s = time.thread_time() + 0.05
        while time.thread_time() < end_s:
            pass
    computed = loading.measure_share()
    with loading:
        threading.Event().wait(0.1)
    waited = loading.measure_share()
    assert computed is not None
    assert waited is not None
    assert waited < computed / 3  # a ratio: on a busy machine both shares are small


def test_loader_cpu_share_of_processes() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    loading = LoaderCpuUsage([busy.pid])
    while (read_cpu_seconds(busy.pid) or 0.0) < 0.2:
        os.sched_yield()
    share = loading.measure_share()
    busy.kill()
    busy.wait()
    assert share is not None
    assert share > 0.1
    assert loading.measure_share() is None
