"""`launcher --help`."""

from __future__ import annotations

from launcher.cli.help import format_help
from launcher.config.keys import config_keys


def test_help_lists_every_key_within_terminal_width() -> None:
    text = format_help(80)
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.strip() for line in text.splitlines()]
    for key in config_keys().values():
        assert any(line.startswith(f"{key.name}=") for line in lines), key.name
        assert key.doc
    assert "batch=      bounded, goodput, hold, scale" in lines
    assert "how often the learning rate changes (update, epoch)" in lines
    assert max(map(len, format_help(60).splitlines())) <= 60
