"""Mask passwords and tokens in everything that is printed or written; the recipe gets the unmasked values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MASK", "redact", "redacted"]

MASK = "***"

#: A name that is, or ends in, a secret's name: token, access_token, WANDB_API_KEY, X-Amz-Signature; not "monkey".
SECRET = (
    r"(?:[\w.-]*[_.-])?"
    r"(?:(?:api|access|auth|private|secret)?(?:key|token)|secret|password|passwd|pwd|signature|credential|sig)"
)
NAME = re.compile(SECRET, re.IGNORECASE)
#: The part of a URL after the scheme, up to a space or a quote.
ADDRESS = re.compile(r"(?<=://)[^\s\"'<>]+")
#: A host's port, which is not a password.
PORT = re.compile(r"\d*([/?#]|$)")
#: A token in place of the user name, as git servers accept it; user names are shorter.
TOKEN = re.compile(r"[\w-]{20,}")
#: name=value in a URL, on a command line or in a message; %3D, %3F and %26 are an escaped =, ? and &.
ASSIGNED = re.compile(
    rf"(?:(?<![\w.-])|(?<=%3F)|(?<=%26))({SECRET}(?:=|%3D))(\"[^\"]*\"|'[^']*'|[^\s&#\"'<>]+)", re.IGNORECASE
)
#: {"name": "value"}, as JSON and Python print a mapping.
QUOTED = re.compile(rf"((['\"]){SECRET}\2\s*:\s*)(\"[^\"]*\"|'[^']*')", re.IGNORECASE)


def redact(text: str) -> str:
    """Mask the passwords in URLs and the values of token=, key=, secret=, password= in `text`."""
    if "://" in text:
        text = ADDRESS.sub(lambda match: "://".join(map(_without_password, match[0].split("://"))), text)
    if "=" in text or "%3" in text:
        text = ASSIGNED.sub(rf"\1{MASK}", text)
    if ":" in text:
        text = QUOTED.sub(rf'\1"{MASK}"', text)
    return text


def _without_password(address: str) -> str:
    """Turn `user:password@host/path` into `user:***@host/path`; a password may contain an unescaped @ or /."""
    authority = re.split(r"[/?#]", address, maxsplit=1)[0]
    if "@" in authority:
        who, _, _ = authority.rpartition("@")
        user, _, password = who.partition(":")
        hidden = f"{user}:{MASK}" if password else MASK if TOKEN.fullmatch(who) else who
        return hidden + address[len(who) :]
    user, _, rest = address.partition(":")
    if "@" in rest and not re.search(r"[/?#[]", user) and not PORT.match(rest):
        return f"{user}:{MASK}@{rest.partition('@')[2]}"
    return address


def redacted(value: Any) -> Any:
    """Copy nested plain values with every text masked; text stored under a secret's name is masked entirely."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: _under(name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value


def _under(name: Any, value: Any) -> Any:
    if isinstance(value, str) and value and isinstance(name, str) and NAME.fullmatch(name):
        return MASK
    return redacted(value)
