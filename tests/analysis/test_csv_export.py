"""`launcher export`: metrics as standard CSV, with each update once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from launcher.cli.main import main
from tests.helpers.written_runs import make_row, write_run


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_superseded_updates_export_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [make_row(update) for update in range(1, 6)] + [make_row(update, generation=2) for update in range(4, 8)]
    assert main(["export", str(write_run(tmp_path / "run", rows))]) == 0
    read_back = read_csv(capsys.readouterr().out)
    assert [(line["update"], line["generation"]) for line in read_back] == [
        (str(update), "1" if update < 4 else "2") for update in range(1, 8)
    ]


def test_columns_follow_documented_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        make_row(1),
        make_row(2, val__loss=0.5, val__f1=0.25, noise__scale=30.0),
        make_row(3, elastic__recovery_s=1.5),
    ]
    assert main(["export", str(write_run(tmp_path / "run", rows))]) == 0
    header = capsys.readouterr().out.splitlines()[0].split(",")
    assert header[:7] == ["time", "samples", "update", "epoch", "world", "generation", "train/loss"]
    chosen = [key for key in header if key.split("/")[0] in ("val", "noise", "elastic")]
    assert chosen == ["val/loss", "noise/scale", "elastic/recovery_s", "val/f1"]
    assert header.index("stage/data/ms") < header.index("stage/other/ms") < header.index("noise/scale")


def test_numbers_keep_precision_and_missing_values_are_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row(1, train__loss=0.1234567890123456), make_row(2, train__loss=None, val__loss=1e-30)]
    assert main(["export", str(write_run(tmp_path / "run", rows))]) == 0
    first, second = read_csv(capsys.readouterr().out)
    assert (float(first["train/loss"]), first["val/loss"]) == (0.1234567890123456, "")
    assert (second["train/loss"], float(second["val/loss"])) == ("", 1e-30)


def test_output_file_is_replaced_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments are paths even if they contain `=`."""
    folder, file = write_run(tmp_path / "lr=0.1", [make_row(1)]), tmp_path / "out.csv"
    file.write_text("old")
    assert main(["export", str(folder), "-o", str(file)]) == 0
    assert len(read_csv(file.read_text())) == 1
    assert capsys.readouterr().out == f"{file}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr=0.1", "out.csv"]


def test_metric_names_are_escaped_as_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", [{**make_row(1), '=HYPERLINK("http://x","y")': 1.0, 'a,"b"': 2.0}])
    assert main(["export", str(folder)]) == 0
    [line] = read_csv(capsys.readouterr().out)
    assert line['a,"b"'] == "2.0"
    assert line['\'=HYPERLINK("http://x","y")'] == "1.0"


def test_csv_equals_metrics_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", [make_row(update, stage__rank=1) for update in range(1, 4)])
    assert main(["export", str(folder)]) == 0
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [{key: float(value) for key, value in line.items()} for line in read_csv(capsys.readouterr().out)] == kept


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "type launcher export RUN"),
        (["a", "b"], "type launcher export RUN"),
        (["nowhere"], "nowhere is not a run"),
        (["run", "-o"], "-o has no value"),
        (["run", "-o", "no/such/folder/x.csv"], "-o no/such/folder/x.csv cannot be written"),
        (["run", "-o", "run"], "-o run cannot be written"),
        (["run", "format=json"], "format=json has no effect for export"),
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
    write_run(tmp_path / "run", [make_row(1)])
    assert main(["export", *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
