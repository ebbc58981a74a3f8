"""The ruler that measures every program alike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from overhead_workload import Items, OtherProcesses, Perceptron, Ruler, make_workload

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(600)"


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("OVERHEAD_FOLDER", str(tmp_path)), ("OVERHEAD_MARKS", "2,4,6"), ("RANK", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("marks")
def test_notes_are_written_at_the_last_mark(tmp_path: Path) -> None:
    ruler, report = Ruler(), tmp_path / "rank1.json"
    for _ in range(5):
        ruler.count_call()
    begin_s = time.process_time()
    while time.process_time() < begin_s + 0.05:
        pass
    assert not report.exists()
    ruler.count_call()
    found = json.loads(report.read_text())
    _, begin, end = found["notes"]
    assert end["cpu_s"] - begin["cpu_s"] >= 0.05
    assert end["wall_s"] - begin["wall_s"] >= 0.05
    assert found["peak_rss_kb"] > 10_000


@pytest.mark.usefixtures("marks")
def test_checks_without_gradients_do_not_count(tmp_path: Path) -> None:
    ruler = Ruler()
    with torch.no_grad():
        for _ in range(20):
            ruler.count_call()
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_other_processes_of_the_job_are_found_by_their_environment(tmp_path: Path) -> None:
    """The ranks, which are children of the agent, measure themselves."""
    env = os.environ | {"OVERHEAD_FOLDER": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", BURN], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.25 < OtherProcesses(str(tmp_path), agent=1).sum_cpu_s() < 1.0
        assert OtherProcesses(str(tmp_path), agent=os.getpid()).sum_cpu_s() == 0
        assert OtherProcesses(f"{tmp_path}-other", agent=1).sum_cpu_s() == 0
        process.kill()


@pytest.mark.process
def test_process_without_a_parent_in_the_job_still_counts_when_it_has_ended(tmp_path: Path) -> None:
    env, others = os.environ | {"OVERHEAD_FOLDER": str(tmp_path)}, OtherProcesses(str(tmp_path), agent=-1)
    argv = ["sh", "-c", '"$0" -c "$1" & echo $!', sys.executable, BURN]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        parent.stdout.readline()  # it has used its time
        parent.wait()
        used_s = others.sum_cpu_s()
        os.kill(orphan, signal.SIGKILL)
        parent.stdout.read()  # until it has ended
    assert used_s > 0.25
    assert others.sum_cpu_s() >= used_s
    assert OtherProcesses(str(tmp_path), agent=-1).sum_cpu_s() == 0


def test_perceptron_is_a_recipe() -> None:
    recipe = make_workload("perceptron", ["width=8", "samples=32"])
    assert recipe == Perceptron(width=8, samples=32)
    assert recipe.size("train") == len(recipe.dataset("train")) == 32
    batch = torch.utils.data.default_collate([recipe.dataset("train")[index] for index in range(4)])
    model = recipe.model()
    loss = recipe.loss(model, batch)
    total, count = recipe.compute_sums(model, batch)
    assert loss.count == count == 4
    assert loss.total.item() == total.item()


def test_batches_have_the_same_samples() -> None:
    whole, one = make_workload("perceptron", ["in_batches=true"]).dataset("train"), Items(16_384)
    inputs, labels = whole.__getitems__([3, 5])
    assert torch.equal(inputs[1], one[5][0])
    assert torch.equal(labels[0], one[3][1])


@pytest.mark.parametrize("name", ["gpt", "mlp", "resnet"])
def test_shipped_recipes_can_be_measured(name: str) -> None:
    recipe = make_workload(name, [])
    assert type(recipe).__module__ == "overhead_workload"
    assert callable(recipe.loss)
