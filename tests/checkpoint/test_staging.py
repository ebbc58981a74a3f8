"""The staging buffers of asynchronous saving."""

from __future__ import annotations

import torch

from launcher.checkpoint.staging import StagingBuffers


def test_staged_copy_is_independent() -> None:
    snapshot = StagingBuffers()
    live = {"weight": torch.ones(3), "steps": torch.tensor(4, dtype=torch.int64)}
    copies = snapshot.stage("model", live)
    live["weight"].zero_()
    assert copies["weight"].tolist() == [1, 1, 1]
    assert int(copies["steps"]) == 4


def test_staging_buffers_are_reused() -> None:
    snapshot = StagingBuffers()
    first = snapshot.stage("model", {"weight": torch.ones(3)})["weight"]
    second = snapshot.stage("model", {"weight": torch.full((3,), 2.0)})["weight"]
    assert first.data_ptr() == second.data_ptr()
    assert second.tolist() == [2, 2, 2]


def test_tied_tensors_share_storage_but_views_do_not() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    copies = StagingBuffers().stage("model", {"embed": weight, "head": weight, "row": weight[0], "turned": weight.t()})
    assert copies["embed"].data_ptr() == copies["head"].data_ptr()
    assert copies["row"].tolist() == [0, 1, 2]
    assert torch.equal(copies["turned"], weight.t())


def test_groups_have_separate_buffers() -> None:
    snapshot = StagingBuffers()
    model = snapshot.stage("model", {"a": torch.ones(2)})
    optimizer = snapshot.stage("optimizer", {"a": torch.zeros(2)})
    assert (model["a"].tolist(), optimizer["a"].tolist()) == ([1, 1], [0, 0])


def test_unsupported_values_are_passed_through() -> None:
    odd = {"text": "hello", "nothing": torch.empty(2, device="meta")}
    assert StagingBuffers().stage("model", odd) == odd  # type: ignore[arg-type]
