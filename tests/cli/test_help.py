"""`launcher --help` and the help of each command."""

from __future__ import annotations

import pytest

from launcher.cli.help import format_help, format_short_help, format_verb_help
from launcher.cli.main import INTERNAL_VERBS, VERBS
from launcher.cli.verb_help import VERB_HELP
from launcher.config.coercion import list_choices
from launcher.config.keys import config_keys


def test_help_lists_every_key_within_terminal_width() -> None:
    text = format_help(80)
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.strip() for line in text.splitlines()]
    for key in config_keys().values():
        assert any(line.startswith(f"{key.name}=") for line in lines), key.name
        assert key.doc
    assert "batch=      bounded, goodput, hold, scale" in lines
    assert max(map(len, format_help(60).splitlines())) <= 60


def test_help_names_the_choices_of_every_key() -> None:
    """They stand beside the key, whether or not its documentation names them."""
    text = " ".join(format_help(100).partition("Keys, their defaults")[2].split())
    names = list(config_keys())
    for key, following in zip(names, [*names[1:], None], strict=True):
        start = text.index(f" {key}=")
        shown = text[start : text.index(f" {following}=", start) if following else None]
        for choice in list_choices(config_keys()[key].type):
            assert str(choice) in shown, (key, choice)
    assert "schedule.per=update one of update, epoch" in text
    assert "train.compile=false true or false" in text


def test_every_command_has_help_of_its_own() -> None:
    public = [verb for verb in VERBS if verb not in INTERNAL_VERBS]
    assert set(VERB_HELP) == set(public)
    short = format_short_help(80)
    for verb in public:
        text = format_verb_help(verb, 80)
        assert text.startswith(f"Usage: launcher {verb} ")
        assert max(map(len, text.splitlines())) <= 80
        assert f"  {verb} " in short
    assert "--now" in format_verb_help("stop")


@pytest.mark.parametrize(("verb", "shown", "hidden"), [("tune", "tune.sizes", "lr.base"), ("plan", "lr.base", "tune.")])
def test_help_of_a_command_lists_the_keys_that_matter_to_it(verb: str, shown: str, hidden: str) -> None:
    text = format_verb_help(verb, 80)
    assert f"  {shown}=" in text
    assert f"  {hidden}" not in text
    assert "launcher train --help lists all of them" in text


def test_help_without_keys_names_where_they_are() -> None:
    text = format_short_help(80)
    assert "batch.per_device=32 " not in text
    assert "launcher --help lists all keys." in text
