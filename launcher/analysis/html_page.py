"""The shell of the HTML pages: head, style, content policy, escaping and figures. No network access, no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape

from launcher.analysis.html_style import STYLESHEET
from launcher.system.formatting import strip_control_characters

__all__ = ["escape_html", "render_figure", "render_page"]


def render_page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """Return a complete HTML document; the sections are HTML, the title and the subtitle are text."""
    digest = base64.b64encode(hashlib.sha256(STYLESHEET.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    heading = f"<header><h1>{escape_html(title)}</h1><p>{escape_html(subtitle)}</p></header>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape_html(title)}</title>\n<style>{STYLESHEET}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join([heading, *sections])
        + "\n</main>\n</body>\n</html>\n"
    )


def render_figure(title: str, *parts: str) -> str:
    """Return a figure with its title above a chart and a legend, in the given order."""
    return f"<figure><figcaption>{escape_html(title)}</figcaption>{''.join(parts)}</figure>"


def escape_html(text: object) -> str:
    """Untrusted text as one line of escaped HTML."""
    return escape(strip_control_characters(text), quote=True)
