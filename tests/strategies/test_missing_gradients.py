"""Losses that use a model's parts, or leave parameters out: two workers train as one does, or refuse the step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.strategies.missing_gradients import GradientUse
from tests.helpers.jobs import make_env

pytestmark = pytest.mark.process

CASES = Path(__file__).parents[1] / "helpers/gradient_cases.py"
UPDATES = 4
FIX = "strategy.find_unused_parameters=true"
#: Loss -> updates that are completed before the one that is refused.
REFUSED = {
    "ddp": {"never": 0, "rank 0": 0, "not in update 2": 2, "not in the last micro-batch": 0, "frozen later": 2},
    "ddp static_graph": {"not in update 2": 2, "frozen later": 2, "once": 1},
    "fsdp": {"rank 0": 0, "not in update 2": 2, "once": 1, "frozen later": 2},
    "deepspeed 0": {"never": 0, "rank 0": 0, "not in update 2": 2},
    "deepspeed 2": {"never": 0, "rank 0": 0, "not in update 2": 2},
}
LEFT_OUT = ["never", "rank 0", "not in update 2", "not in the last micro-batch", "once", "frozen later"]
PADDING = ["padding without aux", "aux only in padding"]
EQUAL = {
    "ddp": ["whole", "parts"],
    "exact": ["whole", "parts", "never", "not in update 2"],
    "ddp find_unused_parameters": ["whole", "parts", *LEFT_OUT, "fewer blocks", *PADDING, "aux in padding"],
    "ddp static_graph": ["whole", "parts", "never", "rank 0", "not in the last micro-batch", "reentrant", PADDING[0]],
    "fsdp": ["whole", "parts", "never", "not in the last micro-batch", *PADDING],
    "fsdp find_unused_parameters": ["whole", "parts", *LEFT_OUT, *PADDING, "aux in padding"],
    "deepspeed 0 undecayed": PADDING,
    "deepspeed 2 undecayed": [PADDING[0]],
    **{f"deepspeed {stage}": ["whole", "parts"] for stage in range(4)},
}


def run_cases(folder: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Run the cases of the strategies that begin with `kind`; the outcomes of both ranks by case."""
    uses = {
        strategy: [*EQUAL.get(strategy, []), *REFUSED.get(strategy, [])]
        for strategy in (*EQUAL, *(REFUSED.keys() - EQUAL.keys()))
        if (strategy.split()[0] == "deepspeed") == (kind == "deepspeed")
    }
    cases = [f"{strategy}: {use}" for strategy, names in uses.items() for use in names]
    if kind == "torch":
        cases += ["ddp: reentrant", "ddp static_graph: no target"]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(CASES), str(folder), str(rank), *cases],
            env=make_env(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"),
            stdout=(folder / f"{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(ranks):
        assert process.wait(timeout=300) == 0, (folder / f"{rank}.log").read_text()[-3000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return {case: [first[case], second[case]] for case in cases}


@pytest.fixture(scope="module")
def torch_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_cases(tmp_path_factory.mktemp("torch"), "torch")


@pytest.fixture(scope="module")
def deepspeed_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_cases(tmp_path_factory.mktemp("deepspeed"), "deepspeed")


def assert_equal_to_one_worker(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    checked = 0
    for strategy, uses in EQUAL.items():
        for case in (f"{strategy}: {use}" for use in uses):
            for outcome in outcomes.get(case, []):
                assert (outcome["error"], outcome["steps"]) == ("", UPDATES), case
                assert outcome["difference"] <= 1e-6, case
                checked += 1
    assert checked >= 8


def assert_refused_before_the_step(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """A rank names what it lacks; the other stops in the same update, with the same error or with the lost connection.

    Under a static graph the other rank may have taken the step, which it cannot save.
    """
    checked = 0
    for strategy, uses in REFUSED.items():
        for use, steps in uses.items():
            ranks = outcomes.get(f"{strategy}: {use}", [])
            final = [outcome for outcome in ranks if outcome["kind"] == "TrainingFailed"]
            if ranks:
                assert all(outcome["error"] for outcome in ranks), (strategy, use)
                assert {outcome["steps"] for outcome in final} == {steps}, (strategy, use)
                assert all("aux.weight" in outcome["error"] and FIX in outcome["error"] for outcome in final)
                assert not any("blocks" in outcome["error"] or "enc" in outcome["error"] for outcome in final)
                checked += 1
    assert checked >= 6


def test_torch_strategies_equal_one_worker(torch_outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert_equal_to_one_worker(torch_outcomes)


def test_torch_strategies_refuse_what_was_not_summed(torch_outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert_refused_before_the_step(torch_outcomes)


def test_reentrant_checkpoints_name_the_static_graph(torch_outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for outcome in torch_outcomes["ddp: reentrant"]:
        assert (outcome["kind"], outcome["steps"]) == ("TrainingFailed", 0)
        assert "strategy.static_graph=true" in outcome["error"]


def test_static_graph_refuses_a_micro_batch_without_a_target(torch_outcomes: dict[str, list[dict[str, Any]]]) -> None:
    for outcome in torch_outcomes["ddp static_graph: no target"]:
        assert (outcome["kind"], outcome["steps"]) == ("TrainingFailed", 0)
        assert "a micro-batch without a target cannot be combined with strategy.static_graph=true" in outcome["error"]


def test_update_in_which_nothing_counts_shows_nothing_about_use() -> None:
    weight = torch.ones(1, requires_grad=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        use = GradientUse(["weight", "other"], torch.device("cpu"))
        use.register("weight", weight)
        use.begin_micro_batch(counts=False)
        weight.sum().backward()
        assert use.end_update() == frozenset()
        use.begin_micro_batch(counts=True)
        weight.sum().backward()
        assert use.end_update() == {"other"}
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_deepspeed_equals_one_worker(deepspeed_outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert_equal_to_one_worker(deepspeed_outcomes)


@pytest.mark.slow
def test_deepspeed_refuses_what_was_not_summed(deepspeed_outcomes: dict[str, list[dict[str, Any]]]) -> None:
    assert_refused_before_the_step(deepspeed_outcomes)
