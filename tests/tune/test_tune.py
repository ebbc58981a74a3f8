"""tune without measuring: which sizes it tries, how it detects out-of-memory, and what it reports."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import RunConfig, TuneConfig
from launcher.distributed.store_gather import StoreGather
from launcher.errors import UsageError
from launcher.goodput.measured_noise import MeasuredNoise
from launcher.plan.training_plan import DatasetSizes, make_training_plan
from launcher.tune.measurements import Measurement, Measurements, estimate_throughput
from launcher.tune.oom import compute_allowed_bytes, is_out_of_memory, predict_bytes, read_available_bytes
from launcher.tune.report.document import make_tune_document
from launcher.tune.report.goodput_column import goodput_values
from launcher.tune.report.html import render_tune_page
from launcher.tune.report.text import format_tune_text
from launcher.tune.session import check_tune_request, compute_largest_size
from launcher.tune.size_search import (
    choose_initial_size,
    choose_next_size,
    iter_intermediate_sizes,
    next_size_up,
    sizes_around_knee,
)

# --- out of memory ------------------------------------------------------------------------------------------------

WORDINGS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("NPU out of memory. Tried to allocate 1.50 GiB (NPU 0; 61.28 GiB total capacity)"),
    RuntimeError("NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc 6291456 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("unable to mmap 512 bytes from file: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", WORDINGS, ids=lambda error: f"{type(error).__name__} {str(error)[:30]}")
def test_every_wording_is_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_the_cpu_allocators_own_words_are_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)


def test_what_an_error_was_raised_from_counts() -> None:
    error = UsageError("sample 3 cannot be read")
    assert not is_out_of_memory(error)
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (20x64 and 65x10)"),
        RuntimeError("Connection closed by peer [127.0.0.1]:1234"),
        ValueError("a dataset called out of memory"),
        KeyError("memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_another_error_is_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_least_of_what_is_free_and_what_the_control_groups_allow(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    (groups / "job" / "step").mkdir(parents=True)
    assert read_available_bytes(proc, groups) == 8000 * 1024
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    (groups / "job" / "memory.max").write_text("5000000\n")
    assert read_available_bytes(proc, groups) == 5_000_000
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/\n")
    (groups / "memory" / "old").mkdir(parents=True)
    (groups / "memory" / "old" / "memory.limit_in_bytes").write_text("3000000\n")
    assert read_available_bytes(proc, groups) == 3_000_000
    assert read_available_bytes(tmp_path / "none", groups) is None
    assert compute_allowed_bytes(1000, 2) == pytest.approx(460)


def test_memory_is_foreseen_from_two_smaller_sizes_on() -> None:
    assert predict_bytes(40, [(10, 1100)]) is None
    assert predict_bytes(40, [(10, 1100), (20, 1200)]) == pytest.approx(1400)
    assert predict_bytes(40, [(10, 1100), (20, 1200), (80, 9999)]) == pytest.approx(1400)


# --- sizes to measure ---------------------------------------------------------------------------------------------


def test_sizes_grow_by_a_root_of_two_up_to_the_largest() -> None:
    sizes: list[int] = []
    size: int | None = choose_initial_size(100)
    while size is not None:
        sizes.append(size)
        size = next_size_up(size, 100)
    assert sizes == [8, 11, 16, 23, 33, 47, 66, 93, 100]


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_exact_end_of_memory_is_found_with_few_tries(largest: int, end: int) -> None:
    works, fails, tries = 0, None, 0
    while (
        size := choose_next_size(works, fails, largest) if works or fails else choose_initial_size(largest)
    ) is not None:
        works, fails = (size, fails) if size <= end else (works, size)
        tries += 1
    assert works == min(largest, end)
    assert tries <= 30


@given(st.integers(1, 1000), st.integers(1, 100_000))
def test_no_step_on_the_way_more_than_doubles(known: int, size: int) -> None:
    way = [known, *iter_intermediate_sizes(known, size), max(known, size)]
    assert all(a <= b <= 2 * a for a, b in pairwise(way))


def test_about_the_knee_multiples_of_eight_and_the_middles_are_tried() -> None:
    assert sizes_around_knee(45, [8, 32, 45, 64], [], 1000) == [38, 40, 48, 54]
    assert sizes_around_knee(45, [8, 32, 40, 45, 48], [50], 1000) == [42, 46]
    assert sizes_around_knee(8, [8, 11], [], 1000) == [4, 9]
    assert sizes_around_knee(2, [2, 3], [], 2) == []


# --- messages -----------------------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "recipe": "Mlp", "world": 2, "accumulation": 1, "train_samples": 1437, "device": "cpu (x86_64)",
    "precision": "fp32", "strategy": "ddp", "threads": 1, "loader_workers": 0, "limit_bytes": 10**10,
    "measured": "2026-01-01T00:00:00+00:00", "spent_s": 12.0, "asked": False,
}  # fmt: skip
STAGES = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")
#: The example of math.md: knee 28, fastest 40, 57 and 80 regressed.
TRACE = {10: 21.4, 14: 25.1, 20: 29.4, 28: 32.9, 40: 35.7, 57: 34.3, 80: 31.5}


def visited(size: int, samples_per_s: float, most: str = "forward", **more: Any) -> Measurement:
    update_ms = 2e3 * size / samples_per_s
    stages = {stage: update_ms * (0.65 if stage == most else 0.05) for stage in STAGES}
    speeds = tuple(samples_per_s * (1 + off) for off in (-0.002, 0.0, 0.002))
    return Measurement(size, speeds, stages, memory_bytes=10**8 + size * 10**5, **more)


def ledger(*visits: Measurement, **more: Any) -> Measurements:
    return Measurements(tuple(visits), **more)


def test_the_known_trace_is_labelled_and_the_knee_is_recommended() -> None:
    found = make_tune_document(ledger(*(visited(*point) for point in TRACE.items())), FACTS)
    assert [point["label"] for point in found["points"]] == [
        "rising", "rising", "rising", "knee", "saturated", "regressed", "regressed",
    ]  # fmt: skip
    assert (found["knee"], found["fastest"], found["recommended"], found["memory_max"]) == (28, 40, 28, 80)
    assert "57 is 1.04 times slower than 40: the forward pass takes" in found["why"]
    first_point = found["points"][0]
    assert first_point["ms_per_update"] == pytest.approx(1e3 * 20 / 21.4, rel=0.01)
    assert first_point["epoch_s"] == pytest.approx(1437 / 21.4, rel=0.01)


def test_a_rank_out_of_memory_caps_what_is_recommended() -> None:
    found = make_tune_document(ledger(visited(8, 10.0), visited(16, 20.0), Measurement(32, where="backward")), FACTS)
    assert (found["points"][-1]["label"], found["points"][-1]["where"]) == ("oom", "backward")
    assert (found["recommended"], found["memory_max"]) == (16, 16)


def test_where_nothing_fits_that_is_said() -> None:
    found = make_tune_document(
        ledger(Measurement(8, where="forward"), Measurement(4, where="foreseen", predicted=True)), FACTS
    )
    assert [point["label"] for point in found["points"]] == ["oom", "oom"]
    assert found["recommended"] is None
    assert "no size fits" in found["why"]
    assert "predicted, not run" in format_tune_text(found)
    assert "<svg" not in render_tune_page(found)


def test_sizes_on_the_way_are_not_told_where_sizes_were_named() -> None:
    way = ledger(
        visited(20, 30.0),
        Measurement(40, where="forward", timing=False),
        Measurement(45, where="forward"),
        only=(20, 45),
    )
    found = make_tune_document(way, {**FACTS, "asked": True})
    assert [point["per_device"] for point in found["points"]] == [20, 45]
    assert found["memory_max"] == 20


def test_two_named_sizes_are_compared() -> None:
    found = make_tune_document(ledger(visited(20, 30.0), visited(45, 60.0), only=(20, 45)), {**FACTS, "asked": True})
    assert "45 is 2.00 times faster than 20" in found["why"]
    slower = make_tune_document(
        ledger(visited(20, 30.0), visited(45, 20.0, "sync"), only=(20, 45)), {**FACTS, "asked": True}
    )
    assert "45 is 1.50 times slower than 20: waiting for other workers takes" in slower["why"]


def test_a_slow_loader_is_named_with_how_many_would_keep_up() -> None:
    """An update of 66.7 ms waits 43.3 ms for data and takes 20 ms without it: three loaders need 14.4 ms each."""
    slow = ledger(visited(1, 30.0, "data"), synthetic=(visited(1, 100.0),))
    found = make_tune_document(slow, FACTS)
    assert found["bottleneck"] == "data"
    assert (
        "the bottleneck is waiting for data (65 % of the time): on synthetic data it would be 100 samples/s"
        in found["why"]
    )
    assert "about data.num_workers=3 would keep up" in found["why"]
    noisy = make_tune_document(ledger(visited(1, 30.0, "data"), synthetic=(visited(1, 29.0),)), FACTS)
    assert "(65 % of the time): raise data.num_workers" in noisy["why"]


def test_overhead_that_does_not_grow_is_told() -> None:
    found = make_tune_document(ledger(*(visited(m, m / (0.1 + 0.0001 * m)) for m in (8, 16, 32))), FACTS)
    assert "is overhead that does not grow with the batch" in found["why"]


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=12))
def test_an_interval_holds_its_value_and_stays_above_zero(speeds: list[float]) -> None:
    value, low, high = estimate_throughput(tuple(speeds))
    assert 0 < low <= value * (1 + 1e-9)
    assert value <= high * (1 + 1e-9)


def test_text_fits_the_screen_and_marks_what_is_recommended() -> None:
    shown = format_tune_text(
        make_tune_document(ledger(*(visited(*point) for point in TRACE.items()), notes=("a note " * 20,)), FACTS)
    )
    assert max(map(len, shown.splitlines())) <= 80
    assert next(line for line in shown.splitlines() if line.endswith("recommended")).split()[0] == "28"
    assert "Time per update at 28: forward 65 %" in shown


def test_goodput_is_shown_where_the_noise_scale_is_known() -> None:
    """At the throughput knee the batch is 2 x 28; with a small noise scale a smaller one makes more progress."""
    found = make_tune_document(ledger(*(visited(*point) for point in TRACE.items())), FACTS)
    assert goodput_values(found, None, 32) is None
    noise = MeasuredNoise(20.0, 10.0, 40.0, "a run of a name that is as long as names can be, and then some")
    worths = goodput_values(found, noise, 32)
    assert worths is not None
    for point, one in zip(found["points"], worths["points"], strict=True):
        batch = 2 * point["per_device"]
        assert one["efficiency"] == pytest.approx((20 + 32) / (20 + batch))
        assert one["goodput"] == pytest.approx(point["samples_per_s"] * (20 + 32) / (20 + batch))
        assert one["low"] < one["goodput"] < one["high"]
    assert worths["best"] == max(worths["points"], key=lambda one: one["goodput"])["per_device"] < found["knee"]
    shown = format_tune_text({**found, "goodput": worths})
    assert max(map(len, shown.splitlines())) <= 80
    assert next(line for line in shown.splitlines() if line.endswith("most progress")).split()[0] == str(worths["best"])
    assert render_tune_page({**found, "goodput": worths}).count("<svg") == 4


def test_the_page_needs_nothing_but_itself_and_escapes() -> None:
    found = make_tune_document(ledger(*(visited(*point) for point in TRACE.items())), {**FACTS, "recipe": "<script>"})
    shown = render_tune_page(found)
    assert "<script" not in shown
    assert "http" not in shown.replace("http-equiv", "")
    assert shown.count("<svg") == 3


def test_a_ledger_survives_a_restart() -> None:
    whole = ledger(visited(8, 10.0), Measurement(16, where="forward"), only=(8, 16), notes=("one",))
    assert Measurements.from_facts(whole.to_facts()) == whole


def test_what_cannot_be_measured_is_refused_with_the_mend() -> None:
    config = RunConfig(
        recipe={"_target_": "x"}, optimizer={"_target_": "torch.optim.SGD"}, tune=TuneConfig(sizes=(20, 800))
    )
    config = replace(config, lr=replace(config.lr, base=0.1, base_batch=32))
    with pytest.raises(UsageError, match=r"^tune\.sizes: 800 samples on each of 2 workers .* type 718 or less$"):
        check_tune_request(config, DatasetSizes(1437, 360), 2)
    bounded = replace(config, tune=TuneConfig(max=100))
    assert (
        compute_largest_size(
            bounded, DatasetSizes(1437, 360), make_training_plan(bounded, DatasetSizes(1437, 360), 2).plan
        )
        == 100
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (TuneConfig(sizes=()), r"^tune\.sizes=\[\] must list sizes >= 1"),
        (TuneConfig(sizes=(8, 0)), r"^tune\.sizes=\[8, 0\] must list sizes >= 1: type e\.g\. tune\.sizes=\[20,45\]$"),
        (TuneConfig(sizes=(8,), max=9), r"^tune\.max=9 has no effect if tune\.sizes is set"),
        (TuneConfig(max=0), r"^tune\.max=0 is below 1"),
        (TuneConfig(budget_s=float("nan")), r"^tune\.budget_s=nan must be > 0"),
        (TuneConfig(budget_s=-1.0), r"^tune\.budget_s=-1\.0 must be > 0"),
    ],
)
def test_a_wrong_key_is_refused_before_anything_starts(asked: TuneConfig, said: str) -> None:
    config = RunConfig(recipe={"_target_": "x"}, optimizer={"_target_": "torch.optim.SGD"}, tune=asked)
    with pytest.raises(UsageError, match=said):
        make_training_plan(replace(config, lr=replace(config.lr, base=0.1, base_batch=32)), DatasetSizes(1437, 360), 1)


def test_rank_0_stays_until_the_others_have_heard_it() -> None:
    """This rank may host the store: if it exits early, the others receive nothing."""
    store = dist.HashStore()
    one = threading.Thread(target=StoreGather(store, 0, 2).close)
    one.start()
    one.join(0.05)
    assert one.is_alive()
    StoreGather(store, 1, 2).close()
    one.join(10)
    assert not one.is_alive()
    StoreGather(store, 0, 1).close()
