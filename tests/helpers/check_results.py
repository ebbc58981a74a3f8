"""Assertions on the results of `launcher doctor`."""

from __future__ import annotations

from launcher.cli.machine_checks import CheckResult


def assert_failed(check: CheckResult, *expected: str, fix: str) -> None:
    assert not check.ok
    assert [word for word in expected if word not in check.detail] == []
    assert fix in check.fix


def assert_passed(check: CheckResult, *expected: str) -> None:
    assert check.ok
    assert [word for word in expected if word not in check.detail] == []
    assert check.fix == ""
