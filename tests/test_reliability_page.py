"""docs/reliability.md names a test for each of its points, and each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
POINTS = re.findall(r"^- \*\*(.+?)\*\*(.*?)(?=^- |^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("title", "text"), POINTS, ids=[title for title, _ in POINTS])
def test_point_names_tests_that_exist(title: str, text: str) -> None:
    named = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::([\w:]+))?`", text)
    assert named, title
    for path, test in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in test.split("::") if test else ():
            assert re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE), f"{path}::{test}"


def test_page_has_points_in_every_section() -> None:
    sections = re.split(r"^## .+$", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) == 5
    assert all(re.search(r"^- \*\*", section, re.MULTILINE) for section in sections)
