"""`launcher report`: a self-contained page, for any run name and any file content."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.analysis.svg_charts import ChartAxis, Series, downsample, render_line_chart
from launcher.cli.main import main
from tests.helpers.written_runs import row, write

VOID = {"meta", "br", "hr", "img", "input", "link"}
EVENTS = (
    {"time": 1000.0, "event": "start", "recipe": "Mlp", "world": 2},
    {"time": 1004.0, "event": "resize", "from": {"world": 2}, "to": {"world": 3}, "why": "a node came"},
    {"time": 1005.0, "event": "alarm", "kind": "straggler", "detail": "rank 1 is slow"},
)


class Page(HTMLParser):
    """Parse the elements of a page as a browser does, and check that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str, word: str = "") -> int:
        classes = [(attributes.get("class") or "").split() for name, attributes in self.tags if name == tag]
        return sum(not word or word in each for each in classes)


def resized(folder: Path) -> Path:
    """2 workers, a crash, then 3 of them."""
    rows = [row(update, noise__scale=50.0, noise__scale_low=40.0, noise__scale_high=70.0) for update in range(1, 31)]
    rows += [row(update, generation=2) for update in range(25, 51)]
    rows += [row(update, generation=3, world=3, val__accuracy=update / 100) for update in range(51, 81)]
    return write(folder, rows, EVENTS)


def reported(*args: str) -> Page:
    assert main(["report", *args]) == 0
    return Page(Path(args[args.index("-o") + 1]).read_text())


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "page.html")


# --- page content -------------------------------------------------------------------------------------------------


def test_curves_stages_and_what_happened(tmp_path: Path, out: str) -> None:
    page = reported(str(resized(tmp_path / "run")), "-o", out)
    text = " ".join(page.words)
    for words in ("loss", "learning rate", "global batch", "samples/s", "stages, ms per update", "noise scale"):
        assert words in text
    assert "The backward pass takes 50 % of an update" in text
    assert page.count("polygon", "layer") == 5  # stages with a non-zero time
    assert "rank 1 is slow" in text
    assert "world 3" in text


def test_restarts_and_resizes_are_marked_in_every_chart(tmp_path: Path, out: str) -> None:
    page = reported(str(resized(tmp_path / "run")), "-o", out)
    charts = page.count("svg")
    assert charts >= 7
    assert page.count("g", "restart") == page.count("g", "resize") == charts
    assert "resize: 2 to 3 workers" in page.words


def test_a_folder_of_runs_is_compared(tmp_path: Path) -> None:
    """The table lists what differs between the points, and the page is written next to them."""
    for point, rule in enumerate(("none", "sqrt", "linear")):
        folder = write(tmp_path / "sweep" / str(point), [row(u, val__accuracy=0.5 + point / 10) for u in (1, 2, 3)])
        (folder / "run.yaml").write_text(f"lr: {{rule: {rule}}}\nseed: 0\nrun: {{name: {point}}}\n")
        (folder / "done.json").write_text('{"samples": 192, "updates": 3, "seconds": 1.5, "metrics": {}}')
    assert main(["report", str(tmp_path / "sweep")]) == 0
    page = Page((tmp_path / "sweep" / "report.html").read_text())
    assert {"sweep/0", "sweep/2", "lr.rule", "sqrt", "1.5 s", "best val/accuracy", "0.7"} <= set(page.words)
    assert "seed" not in page.words
    assert page.count("details") == 3


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_of_few_rows_has_a_page(tmp_path: Path, out: str, updates: int) -> None:
    page = reported(str(write(tmp_path / "run", [row(update) for update in range(1, updates + 1)])), "-o", out)
    assert page.count("svg") > 0


def test_a_run_with_nothing_but_a_loss_has_a_page(tmp_path: Path, out: str) -> None:
    rows = [{"update": update, "samples": 8 * update, "train/loss": 0.0} for update in range(1, 40)]
    assert reported(str(write(tmp_path / "run", rows)), "-o", out).count("svg") == 1


def test_a_speed_is_told_without_stage_times_too(tmp_path: Path, out: str) -> None:
    key = "throughput/samples_per_s"
    rows = [{"update": update, "samples": 8 * update, key: 100.0 * update} for update in range(1, 6)]
    words = reported(str(write(tmp_path / "run", rows)), "-o", out).words
    assert words[words.index("samples/s") + 1] == "300"


def test_long_runs_stay_small(tmp_path: Path, out: str) -> None:
    reported(str(write(tmp_path / "run", [row(update) for update in range(1, 5001)])), "-o", out)
    assert Path(out).stat().st_size < 300_000


# --- self-containment and escaping --------------------------------------------------------------------------------


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path, out: str) -> None:
    page = reported(str(resized(tmp_path / "run")), "-o", out)
    text = Path(out).read_text()
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "style")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://|url\(|@import|//\w", text)
    assert "prefers-color-scheme:dark" in text


def test_the_policy_allows_the_pages_own_style_alone(tmp_path: Path, out: str) -> None:
    page = reported(str(resized(tmp_path / "run")), "-o", out)
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    [style] = re.findall("<style>(.*?)</style>", Path(out).read_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


HOSTILE = "<script>alert(1)</script>\"'><svg onload=x>&amp;"


def test_hostile_names_labels_and_events_are_text(tmp_path: Path, out: str) -> None:
    rows = [{**row(update), f"val/{HOSTILE}": 0.5} for update in range(1, 20)]
    events = [{"time": "x", "event": "start", "recipe": HOSTILE}, {"event": "alarm", "detail": HOSTILE, "time": None}]
    events += [{"event": "error", "time": 1, HOSTILE: [HOSTILE, {"a": HOSTILE}]}, {"event": [HOSTILE]}]
    one = write(tmp_path / HOSTILE.replace("/", "_"), rows, events)
    (one / "run.yaml").write_text(f"lr: {{rule: {HOSTILE!r}}}\n")
    other = write(tmp_path / "b", rows)
    (other / "run.yaml").write_text("lr: {rule: x}\n")
    page = reported(str(one), str(other), "-o", out)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in page.words  # shown unchanged


def test_passwords_are_masked(tmp_path: Path, out: str) -> None:
    events = [{"time": 1.0, "event": "error", "detail": "s3://user:hunter2@host failed with token=abc123"}]
    reported(str(write(tmp_path / "run", [row(1), row(2)], events)), "-o", out)
    assert "hunter2" not in Path(out).read_text()
    assert "abc123" not in Path(out).read_text()


@pytest.mark.parametrize("broken", ["", "{", "[1]", "null", '{"seconds": "x"}', "a: &a [*a]\n", "\x00\xff"])
def test_broken_files_beside_the_metrics_leave_the_page_whole(tmp_path: Path, out: str, broken: str) -> None:
    folder = write(tmp_path / "run", [row(1), row(2)])
    for name in ("events.jsonl", "done.json", "run.yaml"):
        (folder / name).write_text(broken)
    assert reported(str(folder), "-o", out).count("svg") > 0


# --- output path --------------------------------------------------------------------------------------------------


def test_one_runs_page_lies_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "lr=0.1", [row(1), row(2)])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row(1), row(2)])
    (tmp_path / "link.html").symlink_to(tmp_path / "there.html")
    assert main(["report", str(folder), "-o", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "there.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "type launcher report RUN..."),
        (["nowhere"], "nowhere is not a run"),
        (["a/run", "b/run"], "report: 2 runs are in different folders: add -o FILE.html"),
        (["a/run", "format=json"], "format=json has no effect for report"),
        (["a/run", "--open"], "--open is not an option of report: it takes -o FILE"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    args: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/run", "b/run"):
        write(tmp_path / folder, [row(1)])
    assert main(["report", *args]) == 2
    told = capsys.readouterr()
    assert (told.out, len(told.err.splitlines())) == ("", 1)
    assert said in told.err
    assert not list(tmp_path.rglob("*.html"))


# --- charts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (ChartAxis(0, 100), [0, 20, 40, 60, 80, 100]),
        (ChartAxis(0.3, 0.9), [0.4, 0.6, 0.8]),
        (ChartAxis(0.01, 3, log=True), [0.01, 0.03, 0.1, 0.3, 1, 3]),
        (ChartAxis(1e-6, 1, log=True), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
    ],
)
def test_ticks_are_round_numbers(axis: ChartAxis, ticks: list[float]) -> None:
    assert axis.make_ticks() == pytest.approx(ticks)


def test_one_slow_update_does_not_press_the_others_flat() -> None:
    """The first update takes a hundred times as long: it is clipped in the plot, and the tooltip shows its value."""
    points = tuple((float(x), 1000.0 if x == 0 else 10.0 + x % 3) for x in range(100))
    drawn = render_line_chart([Series("ms", 0, points)], 100, "ms", zero=True)
    heights = [
        float(pair.split(",")[1]) for pair in re.findall(r'polyline class="line s0" points="(.*?)"', drawn)[0].split()
    ]
    assert max(heights[1:]) - min(heights[1:]) > 10
    assert "ms 1,000" in drawn


def test_bins_keep_the_mean_and_the_spread() -> None:
    points: list[tuple[float, Any]] = [(float(x), float(x % 2)) for x in range(1000)]
    means, band = downsample(points, 100)
    assert len(means) == 100
    assert {y for _, y in means} == {0.5}
    assert {(low, high) for _, low, high in band} == {(0.0, 1.0)}
    assert downsample(points[:50], 100) == (points[:50], [])


def told_at(chart: str) -> dict[float, str]:
    """Return the tooltip texts by samples."""
    strips = re.findall(r"<title>([\d,.]+) samples: ([^<]*)</title>", chart)
    return {float(samples.replace(",", "")): said for samples, said in strips}


def test_hovering_tells_of_a_curve_only_where_it_is() -> None:
    """A run that ended early, with a validation every fourth update."""
    long = Series("long", 0, tuple((x, 1.0) for x in range(100, 1700, 100)))
    short = Series("short", 1, tuple((x, 2.0) for x in range(100, 700, 100)))
    sparse = Series("val/loss", 2, ((400, 3.0), (800, 4.0), (1200, 5.0)))
    once = Series("once", 3, ((1000, 6.0),))
    told = told_at(render_line_chart([long, short, sparse, once], 1600, "speed"))
    assert told[100] == "long 1 · short 2"
    assert told[600] == "long 1 · short 2 · val/loss 3"
    assert told[700] == "long 1 · val/loss 4"
    assert told[1000] == "long 1 · val/loss 4 · once 6"
    assert told[1600] == "long 1"
