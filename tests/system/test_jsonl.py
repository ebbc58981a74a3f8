"""Reading JSONL files: whole lines with objects only, from the start, from the end, or while they grow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.system.jsonl import JsonlReader, is_number, iter_jsonl_backwards, parse_json_object


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(lines))
    return path


def test_reader_skips_and_counts_unreadable_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": 1}\n', "nonsense\n", "[1]\n", "\n", '{"a": 2}\n')
    reader = JsonlReader(file)
    for _ in range(2):
        assert [entry["a"] for entry in reader] == [1, 2]
        assert reader.unreadable == 2


@pytest.mark.parametrize(("last", "values"), [('{"a": 2', [1]), ('{"a": 2}', [1, 2])])
def test_incomplete_last_line_is_not_unreadable(tmp_path: Path, last: str, values: list[int]) -> None:
    reader = JsonlReader(write(tmp_path / "a.jsonl", '{"a": 1}\n', last))
    assert [entry["a"] for entry in reader] == values
    assert reader.unreadable == 0


def test_missing_file_has_no_objects(tmp_path: Path) -> None:
    assert list(JsonlReader(tmp_path / "absent.jsonl")) == []
    with pytest.raises(IsADirectoryError):
        list(JsonlReader(tmp_path))


def test_reader_parses_only_lines_that_contain_text(tmp_path: Path) -> None:
    reader = JsonlReader(write(tmp_path / "a.jsonl", '{"a": 1}\n', "nonsense\n", '{"b": 2}\n'), containing='"b')
    assert list(reader) == [{"b": 2}]
    assert reader.unreadable == 0


def test_backwards_iteration_reads_only_the_end(tmp_path: Path) -> None:
    lines = [json.dumps({"number": number}) + "\n" for number in range(50_000)]
    numbers = [entry["number"] for entry in iter_jsonl_backwards(write(tmp_path / "a.jsonl", *lines, '{"numb'))]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] == 49_999
    assert numbers[-1] > 0


@pytest.mark.parametrize("line", [b"1", b"null", b"[{}]", b'{"a"', b"\xff", b"[" * 100_000])
def test_anything_but_an_object_is_none(line: bytes) -> None:
    assert parse_json_object(line) is None


def test_numbers_are_finite_and_not_bool() -> None:
    values = [1, 0.5, True, None, "1", float("nan"), float("inf"), 10**400]
    assert [is_number(value) for value in values] == [True, True, False, False, False, False, False, False]
