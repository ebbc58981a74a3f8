"""What a worker has done before it waits for the other ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: Rank 0 of two decides, and goes on until it connects to the others.
RANK_0 = """
import gc, json, sys
from launcher.config.schema import RunConfig
from launcher.system.garbage_collection import own_this_process
own_this_process()
from launcher.launch import worker
from launcher.launch.decision import MeasurementRequest
from launcher.topology import Topology

def decide(*_):
    modules.append(sorted(sys.modules))
    return MeasurementRequest(RunConfig(), "token")

def trace(frame, event, _):
    if event == "call" and frame.f_code.co_name == "connect_store":
        modules.append(sorted(sys.modules))
        print(json.dumps([*modules, gc.isenabled()]))
        raise SystemExit(0)

modules = []
sys.setprofile(trace)
worker.agree_on_job(Topology(rank=0, world=2), decide, under_driver=False)
"""


@pytest.mark.process
def test_rank_imports_everything_after_its_decision_and_before_it_waits(tmp_path: Path) -> None:
    """A wrong configuration is reported without torch, and the imports of all ranks overlap."""
    argv = [sys.executable, "-c", RANK_0]
    ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    at_decision, at_connection, collects = json.loads(ended.stdout)
    assert "torch" not in at_decision
    assert {"launcher.train.session", "torch._dynamo"} <= set(at_connection)
    later = {"deepspeed", "wandb", "hydra", "hydra_plugins", "pydantic", "pandas", "matplotlib", "transformers"}
    assert not later.intersection(at_connection)
    assert collects
