"""The cost of a restart, and the staging buffers of asynchronous saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launcher.checkpoint.staging import StagingBuffers
from launcher.run_dir.restart_cost import RestartCost, read_last_row, sum_restart_costs


def row(samples: int, **more: float) -> str:
    return json.dumps({"time": 100.0 + samples, "samples": samples, "update": samples // 10, **more})


def test_the_last_whole_row_is_found_behind_one_that_a_kill_cut_off(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(f"{row(10)}\n{row(20)}\n" + row(30)[:15])
    found = read_last_row(metrics)
    assert found is not None
    assert found["samples"] == 20


def test_in_a_long_file_only_the_end_is_read(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f"{row(number)}\n" for number in range(10_000)))
    found = read_last_row(metrics)
    assert found is not None
    assert found["samples"] == 9_999


@pytest.mark.parametrize("text", [None, "", "\n", "{"])
def test_without_a_row_nothing_was_lost(tmp_path: Path, text: str | None) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if text is not None:
        metrics.write_text(text)
    assert read_last_row(metrics) is None
    assert RestartCost.from_last_row(None, 0, restarted=True).to_metrics(5.0) == {}


def test_lost_is_what_lies_between_the_checkpoint_and_the_last_update() -> None:
    before = {"time": 100.0, "samples": 700}
    restarted = RestartCost.from_last_row(before, 500, restarted=True)
    assert restarted.to_metrics(103.5) == {"elastic/recovery_s": 3.5, "elastic/lost_samples": 200}
    begun_anew = RestartCost.from_last_row(before, 500, restarted=False)
    assert begun_anew.to_metrics(9e9) == {"elastic/lost_samples": 200}, "a night between two commands is no recovery"
    assert RestartCost.from_last_row(before, 700, restarted=False).to_metrics(9e9) == {}, "a polite stop loses nothing"


def test_the_totals_are_those_of_all_restarts_also_of_superseded_rows(tmp_path: Path) -> None:
    one = row(10, **{"elastic/recovery_s": 2.0, "elastic/lost_samples": 5})
    two = row(10, **{"elastic/recovery_s": 3.0, "elastic/lost_samples": 0})
    three = row(20, **{"elastic/lost_samples": 7})
    (tmp_path / "m").write_text("\n".join([row(5), one, row(20), two, three]) + "\n")
    assert sum_restart_costs(tmp_path / "m") == {"recovery_s": 5.0, "lost_samples": 12}


# --- staging buffers ------------------------------------------------------------------------------------------------


def test_a_copy_does_not_follow_what_training_does_next() -> None:
    snapshot = StagingBuffers()
    live = {"weight": torch.ones(3), "steps": torch.tensor(4, dtype=torch.int64)}
    copies = snapshot.stage("model", live)
    live["weight"].zero_()
    assert copies["weight"].tolist() == [1, 1, 1]
    assert int(copies["steps"]) == 4


def test_buffers_are_reused() -> None:
    snapshot = StagingBuffers()
    first = snapshot.stage("model", {"weight": torch.ones(3)})["weight"]
    second = snapshot.stage("model", {"weight": torch.full((3,), 2.0)})["weight"]
    assert first.data_ptr() == second.data_ptr()
    assert second.tolist() == [2, 2, 2]


def test_tied_tensors_stay_tied_and_views_stay_apart() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    copies = StagingBuffers().stage("model", {"embed": weight, "head": weight, "row": weight[0], "turned": weight.t()})
    assert copies["embed"].data_ptr() == copies["head"].data_ptr()
    assert copies["row"].tolist() == [0, 1, 2]
    assert torch.equal(copies["turned"], weight.t())


def test_the_same_name_in_two_groups_is_two_tensors() -> None:
    snapshot = StagingBuffers()
    model = snapshot.stage("model", {"a": torch.ones(2)})
    optimizer = snapshot.stage("optimizer", {"a": torch.zeros(2)})
    assert (model["a"].tolist(), optimizer["a"].tolist()) == ([1, 1], [0, 0])


def test_what_is_no_dense_tensor_is_left_for_the_checkpoint_to_refuse() -> None:
    odd = {"text": "hello", "nothing": torch.empty(2, device="meta")}
    assert StagingBuffers().stage("model", odd) == odd  # type: ignore[arg-type]
