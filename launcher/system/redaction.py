"""Mask passwords and tokens in everything that is printed or written; the recipe gets the unmasked values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MASK", "mask_nested_secrets", "mask_secrets"]

MASK = "***"

#: A name that is, or ends in, a secret's name: token, access_token, WANDB_API_KEY, X-Amz-Signature; not "monkey".
SECRET_NAME_REGEX = (
    r"(?:[\w.-]*[_.-])?"
    r"(?:(?:api|access|auth|private|secret)?(?:key|token)|secret|password|passwd|pwd|signature|credential|sig)"
)
SECRET_NAME_PATTERN = re.compile(SECRET_NAME_REGEX, re.IGNORECASE)
#: The part of a URL after the scheme, up to a space or a quote.
URL_ADDRESS_PATTERN = re.compile(r"(?<=://)[^\s\"'<>]+")
#: A host's port, which is not a password.
PORT_PATTERN = re.compile(r"\d*([/?#]|$)")
#: A token in place of the user name, as git servers accept it; user names are shorter.
TOKEN_PATTERN = re.compile(r"[\w-]{20,}")
#: name=value in a URL, on a command line or in a message; %3D, %3F and %26 are an escaped =, ? and &.
ASSIGNED_SECRET_PATTERN = re.compile(
    rf"(?:(?<![\w.-])|(?<=%3F)|(?<=%26))({SECRET_NAME_REGEX}(?:=|%3D))(\"[^\"]*\"|'[^']*'|[^\s&#\"'<>]+)", re.IGNORECASE
)
#: {"name": "value"}, as JSON and Python print a mapping.
QUOTED_SECRET_PATTERN = re.compile(rf"((['\"]){SECRET_NAME_REGEX}\2\s*:\s*)(\"[^\"]*\"|'[^']*')", re.IGNORECASE)


def mask_secrets(text: str) -> str:
    """Mask the passwords in URLs and the values of token=, key=, secret=, password= in `text`."""
    if "://" in text:
        text = URL_ADDRESS_PATTERN.sub(lambda match: "://".join(map(_mask_password, match[0].split("://"))), text)
    if "=" in text or "%3" in text:
        text = ASSIGNED_SECRET_PATTERN.sub(rf"\1{MASK}", text)
    if ":" in text:
        text = QUOTED_SECRET_PATTERN.sub(rf'\1"{MASK}"', text)
    return text


def _mask_password(address: str) -> str:
    """Turn `user:password@host/path` into `user:***@host/path`; a password may contain an unescaped @ or /."""
    authority = re.split(r"[/?#]", address, maxsplit=1)[0]
    if "@" in authority:
        userinfo, _, _ = authority.rpartition("@")
        user, _, password = userinfo.partition(":")
        masked = f"{user}:{MASK}" if password else MASK if TOKEN_PATTERN.fullmatch(userinfo) else userinfo
        return masked + address[len(userinfo) :]
    user, _, rest = address.partition(":")
    if "@" in rest and not re.search(r"[/?#[]", user) and not PORT_PATTERN.match(rest):
        return f"{user}:{MASK}@{rest.partition('@')[2]}"
    return address


def mask_nested_secrets(value: Any) -> Any:
    """Copy nested plain values with every text masked; text stored under a secret's name is masked entirely."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, Mapping):
        return {name: _mask_named_value(name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mask_nested_secrets(item) for item in value)
    return value


def _mask_named_value(name: Any, value: Any) -> Any:
    if isinstance(value, str) and value and isinstance(name, str) and SECRET_NAME_PATTERN.fullmatch(name):
        return MASK
    return mask_nested_secrets(value)
