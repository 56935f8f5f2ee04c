"""Pages from ``pages/``: one file each, with style, script and data in it, that fetch nothing and run nothing else."""

import base64
import hashlib
import html
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from chat_logits.display.text import plain

PAGES = Path(__file__).resolve().parent / "pages"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_page(
    template: str,
    script: str | Sequence[str] = (),
    data: dict | None = None,
    lazy_data: dict | None = None,
    styles: Sequence[str] = (),
    **content,
) -> str:
    """A page of ``pages/``, whatever is in its ``content`` escaped.

    ``script`` names files of ``pages/``, which are parts of one function; its hash is in the page's security policy,
    so that nothing else can run. ``data`` is what it reads, ``lazy_data`` what it reads when it needs it. ``styles``
    are files that go after ``style.css``.
    """
    code = _function([script] if isinstance(script, str) else script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup("".join(map(_text, ("style.css", *styles)))),
            script=Markup(code),
            script_sources=f"'sha256-{digest}'" if code else "'none'",
            data=_json(data),
            lazy_data=_json(lazy_data),
            **plain(content),
        )
    )


@cache
def _text(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")


def _function(names: Sequence[str]) -> str:
    """The files as one function, which runs at once, "" without any."""
    return f'"use strict";\n(() => {{\n{"".join(map(_text, names))}}})();\n' if names else ""


def _json(value: dict | None) -> Markup:
    return htmlsafe_json_dumps(plain(value), separators=(",", ":"))


def framed(page: str, height: int = 560) -> str:
    """A page as a part of another one, such as a notebook: in a frame of its own, so that neither styles the other."""
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(page)}" title="Token analysis" '
        f'style="width:100%;height:{height}px;border:1px solid #8884;border-radius:8px;resize:vertical"></iframe>'
    )
