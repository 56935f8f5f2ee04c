"""Pages from ``pages/``: each is one file with its style, script and data, and fetches and runs nothing else."""

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
def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder: all values are escaped, and a missing value is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
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
    """A page of ``pages/``; everything in its ``content`` is escaped.

    ``script`` names files of ``pages/``, which become one function; its hash is in the page's security policy, so that
    nothing else can run. It reads ``data`` at once, ``lazy_data`` when needed. ``styles`` are files that are added
    after ``style.css``.
    """
    code = as_function([PAGES / name for name in ([script] if isinstance(script, str) else script)])
    return (
        environment(PAGES)
        .get_template(template)
        .render(
            style=Markup("".join(text_of(PAGES / name) for name in ("style.css", *styles))),
            script=Markup(code),
            script_sources=hash_source(code) if code else "'none'",
            data=_json(data),
            lazy_data=_json(lazy_data),
            **plain(content),
        )
    )


@cache
def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def as_function(files: Sequence[Path]) -> str:
    """The files of a script as one function that runs at once, "" for no files."""
    return f'"use strict";\n(() => {{\n{"".join(map(text_of, files))}}})();\n' if files else ""


def hash_source(code: str) -> str:
    """The source of a script or a style for a security policy, by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def _json(value: dict | None) -> Markup:
    return htmlsafe_json_dumps(plain(value), separators=(",", ":"))


def framed(page: str, height: int = 560) -> str:
    """A page inside another one, such as a notebook: in its own frame, so that neither styles the other."""
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(page)}" title="Token analysis" '
        f'style="width:100%;height:{height}px;border:1px solid #8884;border-radius:8px;resize:vertical"></iframe>'
    )
