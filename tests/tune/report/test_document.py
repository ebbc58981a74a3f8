"""The result of tune: labels, recommendation, and explanation, as document, text and page."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.goodput.measured_noise import MeasuredNoise
from launcher.tune.measurements import Measurement
from launcher.tune.report.document import explain_recommendation, make_tune_document
from launcher.tune.report.goodput_column import goodput_values
from launcher.tune.report.html import render_tune_page
from launcher.tune.report.text import format_tune_text
from tests.helpers.measured_sizes import FACTS, TRACE, make_measurements, measured_size


def test_example_trace_recommends_the_knee() -> None:
    found = make_tune_document(make_measurements(*(measured_size(*point) for point in TRACE.items())), FACTS)
    assert [point["label"] for point in found["points"]] == [
        "rising", "rising", "rising", "knee", "saturated", "regressed", "regressed",
    ]  # fmt: skip
    assert (found["knee"], found["fastest"], found["recommended"], found["memory_max"]) == (28, 40, 28, 80)
    assert "57 is 1.04 times slower than 40: the forward pass takes" in found["why"]
    first_point = found["points"][0]
    assert first_point["ms_per_update"] == pytest.approx(1e3 * 20 / 21.4, rel=0.01)
    assert first_point["epoch_s"] == pytest.approx(1437 / 21.4, rel=0.01)


def test_oom_caps_the_recommendation() -> None:
    found = make_tune_document(
        make_measurements(measured_size(8, 10.0), measured_size(16, 20.0), Measurement(32, where="backward")), FACTS
    )
    assert (found["points"][-1]["label"], found["points"][-1]["where"]) == ("oom", "backward")
    assert (found["recommended"], found["memory_max"]) == (16, 16)


def test_no_fitting_size_is_reported() -> None:
    found = make_tune_document(
        make_measurements(Measurement(8, where="forward"), Measurement(4, where="foreseen", predicted=True)), FACTS
    )
    assert [point["label"] for point in found["points"]] == ["oom", "oom"]
    assert found["recommended"] is None
    assert "no size fits" in found["why"]
    assert "predicted, not run" in format_tune_text(found)
    assert "<svg" not in render_tune_page(found)


def test_intermediate_sizes_are_hidden_for_listed_sizes() -> None:
    way = make_measurements(
        measured_size(20, 30.0),
        Measurement(40, where="forward", timing=False),
        Measurement(45, where="forward"),
        only=(20, 45),
    )
    found = make_tune_document(way, {**FACTS, "asked": True})
    assert [point["per_device"] for point in found["points"]] == [20, 45]
    assert found["memory_max"] == 20


def test_two_listed_sizes_are_compared() -> None:
    found = make_tune_document(
        make_measurements(measured_size(20, 30.0), measured_size(45, 60.0), only=(20, 45)), {**FACTS, "asked": True}
    )
    assert "45 is 2.00 times faster than 20" in found["why"]
    slower = make_tune_document(
        make_measurements(measured_size(20, 30.0), measured_size(45, 20.0, "sync"), only=(20, 45)),
        {**FACTS, "asked": True},
    )
    assert "45 is 1.50 times slower than 20: waiting for other workers takes" in slower["why"]


def test_slow_loader_advice_gives_num_workers() -> None:
    """An update of 66.7 ms waits 43.3 ms for data and takes 20 ms without it: three loaders need 14.4 ms each."""
    slow = make_measurements(measured_size(1, 30.0, "data"), synthetic=(measured_size(1, 100.0),))
    found = make_tune_document(slow, FACTS)
    assert found["bottleneck"] == "data"
    assert (
        "the bottleneck is waiting for data (65 % of the time): on synthetic data it would be 100 samples/s"
        in found["why"]
    )
    assert "about data.num_workers=3 would keep up" in found["why"]
    noisy = make_tune_document(
        make_measurements(measured_size(1, 30.0, "data"), synthetic=(measured_size(1, 29.0),)), FACTS
    )
    assert "(65 % of the time): raise data.num_workers" in noisy["why"]


def test_fixed_overhead_is_reported() -> None:
    found = make_tune_document(
        make_measurements(*(measured_size(m, m / (0.1 + 0.0001 * m)) for m in (8, 16, 32))), FACTS
    )
    assert "is overhead that does not grow with the batch" in found["why"]


def test_text_fits_80_columns_and_marks_recommendation() -> None:
    text = format_tune_text(
        make_tune_document(
            make_measurements(*(measured_size(*point) for point in TRACE.items()), notes=("a note " * 20,)), FACTS
        )
    )
    assert max(map(len, text.splitlines())) <= 80
    assert next(line for line in text.splitlines() if line.endswith("recommended")).split()[0] == "28"
    assert "Time per update at 28: forward 65 %" in text


def test_goodput_is_shown_with_known_noise() -> None:
    """At the throughput knee the batch is 2 x 28; with a small noise scale a smaller one makes more progress."""
    found = make_tune_document(make_measurements(*(measured_size(*point) for point in TRACE.items())), FACTS)
    assert goodput_values(found, None, 32) is None
    noise = MeasuredNoise(20.0, 10.0, 40.0, "a run of a name that is as long as names can be, and then some")
    goodput = goodput_values(found, noise, 32)
    assert goodput is not None
    for point, one in zip(found["points"], goodput["points"], strict=True):
        batch = 2 * point["per_device"]
        assert one["efficiency"] == pytest.approx((20 + 32) / (20 + batch))
        assert one["goodput"] == pytest.approx(point["samples_per_s"] * (20 + 32) / (20 + batch))
        assert one["low"] < one["goodput"] < one["high"]
    assert goodput["best"] == max(goodput["points"], key=lambda one: one["goodput"])["per_device"] < found["knee"]
    text = format_tune_text({**found, "goodput": goodput})
    assert max(map(len, text.splitlines())) <= 80
    assert next(line for line in text.splitlines() if line.endswith("recommended")).split()[0] == str(goodput["best"])
    assert render_tune_page({**found, "goodput": goodput}).count("<svg") == 4


def measure_trace() -> dict[str, Any]:
    return make_tune_document(make_measurements(*(measured_size(*point) for point in TRACE.items())), FACTS)


def test_only_one_size_is_recommended_with_known_noise() -> None:
    """The knee of samples/s is 28 per worker; at a noise scale of 4, known well, 10 learns more per second."""
    found = measure_trace()
    goodput = goodput_values(found, MeasuredNoise(4.0, 3.8, 4.2, "plan.noise"), 32)
    assert goodput is not None
    why = explain_recommendation(found, goodput, 32)
    assert why.startswith("batch.per_device=28 is the knee of samples/s: 32.9 samples/s")
    assert "use batch.per_device=10, which at a noise scale of 4 samples makes 1.63 times" in why
    assert why.count("use batch.per_device=") == 1
    text = format_tune_text({**found, "goodput": goodput, "why": why})
    assert [line.split()[0] for line in text.splitlines() if line.endswith("recommended")] == ["10"]
    assert [line.split()[0] for line in text.splitlines() if line.endswith("knee of samples/s")] == ["28"]


def test_sizes_within_measurement_error_are_not_opposed() -> None:
    found = measure_trace()
    goodput = goodput_values(found, MeasuredNoise(20.0, 0.1, 4000.0, "plan.noise"), 32)
    why = explain_recommendation(found, goodput, 32)
    assert why.startswith("use batch.per_device=28: 32.9 samples/s")
    assert why.count("use batch.per_device=") == 1


@pytest.mark.parametrize(
    ("train_samples", "base_batch", "told"),
    [
        (200, None, "an update is then 56 of the 200 training samples, 3.571 updates per epoch: so large a batch"),
        (1437, 8, "25.66 updates per epoch instead of 179.6 at lr.base_batch=8, 7 times the batch that lr.base was"),
        (1437, 32, None),
    ],
)
def test_effect_of_large_batch_on_progress_is_told(
    train_samples: int, base_batch: int | None, told: str | None
) -> None:
    why = explain_recommendation({**measure_trace(), "train_samples": train_samples}, None, base_batch)
    assert ("learns less per sample" in why) == (told is not None)
    assert told is None or told in why


@pytest.mark.parametrize(("cores", "told"), [(2, False), (3, True)])
def test_more_workers_are_advised_only_with_free_cores(cores: int, told: bool) -> None:
    why = explain_recommendation({**measure_trace(), "cores": cores, "nodes": 1})
    assert ("or more workers" in why) is told


def test_page_is_self_contained_and_escaped() -> None:
    found = make_tune_document(
        make_measurements(*(measured_size(*point) for point in TRACE.items())), {**FACTS, "recipe": "<script>"}
    )
    text = render_tune_page(found)
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("<svg") == 3
