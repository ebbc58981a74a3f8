"""`launcher report`: a self-contained page, for any run name and any file content."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.cli.main import main
from tests.helpers.written_runs import make_row, write_run

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


def write_resized_run(folder: Path) -> Path:
    """2 workers, a crash, then 3 of them."""
    rows = [
        make_row(update, noise__scale=50.0, noise__scale_low=40.0, noise__scale_high=70.0) for update in range(1, 31)
    ]
    rows += [make_row(update, generation=2) for update in range(25, 51)]
    rows += [make_row(update, generation=3, world=3, val__accuracy=update / 100) for update in range(51, 81)]
    return write_run(folder, rows, EVENTS)


def render_report(*args: str) -> Page:
    assert main(["report", *args]) == 0
    return Page(Path(args[args.index("-o") + 1]).read_text())


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "page.html")


# --- page content -------------------------------------------------------------------------------------------------


def test_page_shows_curves_stages_and_events(tmp_path: Path, out: str) -> None:
    page = render_report(str(write_resized_run(tmp_path / "run")), "-o", out)
    text = " ".join(page.words)
    for words in ("loss", "learning rate", "global batch", "samples/s", "stages, ms per update", "noise scale"):
        assert words in text
    assert "The backward pass takes 50 % of an update" in text
    assert page.count("polygon", "layer") == 5  # stages with a non-zero time
    assert "rank 1 is slow" in text
    assert "world 3" in text


def test_charts_mark_restarts_and_resizes(tmp_path: Path, out: str) -> None:
    page = render_report(str(write_resized_run(tmp_path / "run")), "-o", out)
    charts = page.count("svg")
    assert charts >= 7
    assert page.count("g", "restart") == page.count("g", "resize") == charts
    assert "resize: 2 to 3 workers" in page.words


def test_folder_of_runs_is_compared(tmp_path: Path) -> None:
    """The table lists what differs between the points, and the page is written next to them."""
    for point, rule in enumerate(("none", "sqrt", "linear")):
        folder = write_run(
            tmp_path / "sweep" / str(point), [make_row(u, val__accuracy=0.5 + point / 10) for u in (1, 2, 3)]
        )
        (folder / "run.yaml").write_text(f"lr: {{rule: {rule}}}\nseed: 0\nrun: {{name: {point}}}\n")
        (folder / "done.json").write_text('{"samples": 192, "updates": 3, "seconds": 1.5, "metrics": {}}')
    assert main(["report", str(tmp_path / "sweep")]) == 0
    page = Page((tmp_path / "sweep" / "report.html").read_text())
    assert {"sweep/0", "sweep/2", "lr.rule", "sqrt", "1.5 s", "best val/accuracy", "0.7"} <= set(page.words)
    assert "seed" not in page.words
    assert page.count("details") == 3


def test_stage_times_are_a_table_in_words(tmp_path: Path, out: str) -> None:
    """A screen reader gets from the table what the chart of the stages shows."""
    page = render_report(str(write_resized_run(tmp_path / "run")), "-o", out)
    assert page.count("table", "stages") == 1
    assert page.count("caption") == 1
    at = page.words.index("the backward pass")
    assert page.words[at - 1] == "backward"
    assert re.fullmatch(r"[\d.,]+ ms", page.words[at + 1])
    assert page.words[at + 2] == "50 %"
    assert {"sync", "waiting for other workers", "time per update", "share of the time"} <= set(page.words)


def write_sweep_point(folder: Path, settings: str, best: float, seconds: float, target_s: float | None) -> None:
    write_run(folder, [make_row(update, val__accuracy=best - 0.1 * (3 - update)) for update in (1, 2, 3)])
    (folder / "run.yaml").write_text(settings)
    done = {"samples": 192, "updates": 3, "seconds": seconds, "metrics": {}}
    if target_s is not None:
        done["target"] = {"metric": "val/accuracy", "value": 0.5, "seconds": target_s, "samples": 128, "update": 2}
    (folder / "done.json").write_text(json.dumps(done))


def test_sweep_names_fastest_and_most_accurate_point(tmp_path: Path) -> None:
    """As the table in the terminal does, with the time to the target and the best value of each point."""
    for point, (best, target_s) in enumerate([(0.9, 40.0), (0.7, 15.0), (0.6, None)]):
        write_sweep_point(tmp_path / "sweep" / str(point), f"lr: {{base: {point}}}\n", best, 60.0, target_s)
    assert main(["report", str(tmp_path / "sweep")]) == 0
    words = Page((tmp_path / "sweep" / "report.html").read_text()).words
    assert "time-optimal: sweep/1, 15.0 s to the target" in words
    assert "accuracy-optimal: sweep/0, best val/accuracy 0.9" in words
    assert {"time to target", "40 s", "15 s", "not reached", "best val/accuracy"} <= set(words)


def test_sweep_over_seeds_ranks_averages(tmp_path: Path) -> None:
    for point, (rate, seed, best, target_s) in enumerate(
        [(1, 0, 0.9, 40.0), (1, 1, 0.8, 50.0), (2, 0, 0.95, 60.0), (2, 1, 0.7, 20.0)]
    ):
        settings = f"lr: {{base: {rate}}}\nseed: {seed}\n"
        write_sweep_point(tmp_path / "sweep" / str(point), settings, best, 60.0, target_s)
    assert main(["report", str(tmp_path / "sweep")]) == 0
    words = Page((tmp_path / "sweep" / "report.html").read_text()).words
    assert "time-optimal: lr.base=2 over 2 seeds, 40.0 s to the target" in words
    assert "accuracy-optimal: lr.base=1 over 2 seeds, best val/accuracy 0.85" in words


@pytest.mark.parametrize("updates", [1, 2])
def test_short_run_has_a_page(tmp_path: Path, out: str, updates: int) -> None:
    page = render_report(
        str(write_run(tmp_path / "run", [make_row(update) for update in range(1, updates + 1)])), "-o", out
    )
    assert page.count("svg") > 0


def test_run_with_only_a_loss_has_a_page(tmp_path: Path, out: str) -> None:
    rows = [{"update": update, "samples": 8 * update, "train/loss": 0.0} for update in range(1, 40)]
    assert render_report(str(write_run(tmp_path / "run", rows)), "-o", out).count("svg") == 1


def test_throughput_is_shown_without_stage_times(tmp_path: Path, out: str) -> None:
    key = "throughput/samples_per_s"
    rows = [{"update": update, "samples": 8 * update, key: 100.0 * update} for update in range(1, 6)]
    words = render_report(str(write_run(tmp_path / "run", rows)), "-o", out).words
    assert words[words.index("samples/s") + 1] == "300"


def test_page_of_long_run_stays_small(tmp_path: Path, out: str) -> None:
    render_report(str(write_run(tmp_path / "run", [make_row(update) for update in range(1, 5001)])), "-o", out)
    assert Path(out).stat().st_size < 300_000


# --- self-containment and escaping --------------------------------------------------------------------------------


def test_page_loads_no_resources_and_runs_no_scripts(tmp_path: Path, out: str) -> None:
    page = render_report(str(write_resized_run(tmp_path / "run")), "-o", out)
    text = Path(out).read_text()
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "style")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://|url\(|@import|//\w", text)
    assert "prefers-color-scheme:dark" in text


def test_content_security_policy_allows_only_own_style(tmp_path: Path, out: str) -> None:
    page = render_report(str(write_resized_run(tmp_path / "run")), "-o", out)
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    [style] = re.findall("<style>(.*?)</style>", Path(out).read_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


HOSTILE = "<script>alert(1)</script>\"'><svg onload=x>&amp;"


def test_hostile_names_and_events_are_escaped(tmp_path: Path, out: str) -> None:
    rows = [{**make_row(update), f"val/{HOSTILE}": 0.5} for update in range(1, 20)]
    events = [{"time": "x", "event": "start", "recipe": HOSTILE}, {"event": "alarm", "detail": HOSTILE, "time": None}]
    events += [{"event": "error", "time": 1, HOSTILE: [HOSTILE, {"a": HOSTILE}]}, {"event": [HOSTILE]}]
    one = write_run(tmp_path / HOSTILE.replace("/", "_"), rows, events)
    (one / "run.yaml").write_text(f"lr: {{rule: {HOSTILE!r}}}\n")
    other = write_run(tmp_path / "b", rows)
    (other / "run.yaml").write_text("lr: {rule: x}\n")
    page = render_report(str(one), str(other), "-o", out)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in page.words  # shown unchanged


def test_passwords_are_masked(tmp_path: Path, out: str) -> None:
    events = [{"time": 1.0, "event": "error", "detail": "s3://user:hunter2@host failed with token=abc123"}]
    render_report(str(write_run(tmp_path / "run", [make_row(1), make_row(2)], events)), "-o", out)
    assert "hunter2" not in Path(out).read_text()
    assert "abc123" not in Path(out).read_text()


@pytest.mark.parametrize("broken", ["", "{", "[1]", "null", '{"seconds": "x"}', "a: &a [*a]\n", "\x00\xff"])
def test_broken_side_files_do_not_break_page(tmp_path: Path, out: str, broken: str) -> None:
    folder = write_run(tmp_path / "run", [make_row(1), make_row(2)])
    for name in ("events.jsonl", "done.json", "run.yaml"):
        (folder / name).write_text(broken)
    assert render_report(str(folder), "-o", out).count("svg") > 0


# --- output path --------------------------------------------------------------------------------------------------


def test_page_is_written_to_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "lr=0.1", [make_row(1), make_row(2)])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"


def test_output_symlink_is_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [make_row(1), make_row(2)])
    (tmp_path / "link.html").symlink_to(tmp_path / "there.html")
    assert main(["report", str(folder), "-o", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "there.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "type launcher report RUN..."),
        (["nowhere"], "nowhere is not a run"),
        (["a/run", "b/run"], "report: 2 runs are in different folders: add -o FILE.html"),
        (["a/run", "format=json"], "format=json has no effect for report"),
        (["a/run", "--open"], "--open is not an option of report: it takes -o FILE"),
    ],
)
def test_usage_error_is_one_line_and_writes_nothing(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/run", "b/run"):
        write_run(tmp_path / folder, [make_row(1)])
    assert main(["report", *args]) == 2
    captured = capsys.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)
    assert message in captured.err
    assert not list(tmp_path.rglob("*.html"))
