"""Secrets never reach the screen or a file; other text is unchanged."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.system.redaction import MASK, mask_nested_secrets, mask_secrets

LETTERS = string.ascii_letters + string.digits
SECRET = "hunter2hunter2"


def secrets(signs: str) -> st.SearchStrategy[str]:
    """SECRET surrounded by any characters that a password may contain."""
    around = st.text(alphabet=LETTERS + signs, max_size=8)
    return st.builds(lambda before, after: before + SECRET + after, around, around)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://user:hunter2@host/data", "s3://user:***@host/data"),
        ("postgres://u:p@ss@host:5432/db", "postgres://u:***@host:5432/db"),
        ("http://u:pa/ss@host/x", "http://u:***@host/x"),
        ("redis://:hunter2@host", "redis://:***@host"),
        ("https://host/data?token=abc123&split=train", "https://host/data?token=***&split=train"),
        ("https://host/data?split=train&API_KEY=abc123", "https://host/data?split=train&API_KEY=***"),
        ("https://bucket/x?X-Amz-Signature=abc&X-Amz-Date=1", "https://bucket/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://ghp_0123456789abcdefghij@github.com/a/b", "https://***@github.com/a/b"),
        ("recipe.password='two words' seed=1", "recipe.password=*** seed=1"),
        ("WANDB_API_KEY=abc python", "WANDB_API_KEY=*** python"),
        ("https://host/?next=a%3Ftoken%3Dabc", "https://host/?next=a%3Ftoken%3D***"),
        ("{'api_key': 'abc', 'split': 'train'}", "{'api_key': \"***\", 'split': 'train'}"),
    ],
)
def test_secrets_are_masked(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "batch.per_device=32 is more than the 20 samples of the data set: type batch.per_device=20 or less",
        "throughput/tokens_per_s=1200 tokens=5 monkey=banana keyword=x secretary=y",
        "key: value, token: subword, 3:1 odds at 10:30@noon",
        "http://localhost:8080/path@2x.png and ssh://git@github.com/a/b",
        "mail me@example.org about file:///home/me/data",
        "",
    ],
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert mask_secrets(text) == text


def test_nested_secrets_are_masked_and_types_kept() -> None:
    value = {
        "recipe": {"data": "s3://u:hunter2@host", "api_key": "abc", "width": 64, "token": None},
        "tags": ["a", "token=abc"],
        "ramp": (("0dur", 0.25),),
    }
    assert mask_nested_secrets(value) == {
        "recipe": {"data": "s3://u:***@host", "api_key": MASK, "width": 64, "token": None},
        "tags": ["a", "token=***"],
        "ramp": (("0dur", 0.25),),
    }
    assert value["tags"] == ["a", "token=abc"], "the value itself is not touched"


@given(
    before=st.text(alphabet=LETTERS + " ,;", max_size=20),
    name=st.sampled_from(["token", "key", "api_key", "API_KEY", "secret", "Password", "client_secret"]),
    secret=secrets("-._~+/=,;:!$()"),
    after=st.text(alphabet=LETTERS + " &", max_size=20),
)
def test_secret_in_assignment_is_masked(before: str, name: str, secret: str, after: str) -> None:
    assert SECRET not in mask_secrets(f"{before} {name}={secret} {after}")
    assert SECRET not in mask_secrets(f"{before} https://host/path?x=1&{name}={secret}&{after}")


@given(
    scheme=st.sampled_from(["https", "s3", "postgres", "HTTP", "git+ssh"]),
    user=st.text(alphabet=LETTERS, max_size=8),
    secret=secrets("@-._~+!$:"),
)
def test_password_in_url_is_masked(scheme: str, user: str, secret: str) -> None:
    masked = mask_secrets(f"cannot read {scheme}://{user}:{secret}@host.example/data: refused")
    assert SECRET not in masked
    assert "host.example/data: refused" in masked


@given(st.text())
def test_masking_is_idempotent(text: str) -> None:
    assert mask_secrets(mask_secrets(text)) == mask_secrets(text)


@given(st.text(alphabet=LETTERS + " .,;-/!?()[]{}\n"))
def test_text_without_urls_or_assignments_is_unchanged(text: str) -> None:
    assert mask_secrets(text) == text


@pytest.mark.parametrize("text", ["a" * 100_000, "_" * 100_000 + "=", "http://" * 20_000, "x:" * 50_000 + "//"])
@pytest.mark.timeout(10)
def test_masking_long_text_takes_linear_time(text: str) -> None:
    mask_secrets(text)
