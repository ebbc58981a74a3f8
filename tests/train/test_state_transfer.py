"""A rank that is behind gets the state of another: three processes, whose states are then equal to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import make_env
from tests.helpers.transfer_cases import BEHIND, CASES, LEVEL, SOURCE, TRAINING, WORLD

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[1] / "helpers/transfer_cases.py"
REFUSED = {
    "a wrong bit": "the state that rank 0 received from rank 1 differs from what rank 1 holds",
    "another parameter": "rank 2 has other parameters, or another state of the optimizer, than rank 1",
    "other moments": "rank 2 has other parameters, or another state of the optimizer, than rank 1",
}
TRANSFERRED = [name for name in (*CASES, "adam in small messages") if name not in REFUSED]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank, by case."""
    folder = tmp_path_factory.mktemp("transfer")
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank)],
            env=make_env(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"),
            stdout=(folder / f"{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * WORLD, "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(WORLD))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", TRANSFERRED)
def test_state_is_that_of_the_source_to_the_last_bit(outcomes: list[dict[str, Any]], name: str) -> None:
    behind, source = outcomes[BEHIND][name], outcomes[SOURCE][name]
    assert behind["received"] == source["received"]
    assert behind["received"]["tied"]
    assert behind["continued"] == source["continued"] != source["received"]


@pytest.mark.parametrize("name", TRANSFERRED)
def test_every_rank_has_the_training_facts_of_the_source(outcomes: list[dict[str, Any]], name: str) -> None:
    assert [rank[name]["facts"] for rank in outcomes] == [TRAINING] * WORLD


def test_level_rank_keeps_its_own_buffers_and_extra_state(outcomes: list[dict[str, Any]]) -> None:
    source, level = (outcomes[rank]["adam, own buffers"]["received"] for rank in (SOURCE, LEVEL))
    different = {name for name in source["tensors"] if source["tensors"][name] != level["tensors"][name]}
    assert different == {"model norm.running_mean", "optimizer extra state/_extra_state['recent'][0]"}


@pytest.mark.parametrize("name", REFUSED)
def test_difference_is_refused_on_every_rank(outcomes: list[dict[str, Any]], name: str) -> None:
    for rank in outcomes:
        assert rank[name]["error"].startswith(f"TrainingFailed: {REFUSED[name]}")
