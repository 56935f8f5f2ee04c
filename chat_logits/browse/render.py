"""The pages of the server, from ``pages/``: each includes its style and script, which are allowed by their hashes."""

import html
import re
from functools import cache
from pathlib import Path

from markupsafe import Markup

from chat_logits.display.page import PAGES as DISPLAYED
from chat_logits.display.page import as_function, environment, hash_source, text_of
from chat_logits.display.text import plain

PAGES = Path(__file__).resolve().parent / "pages"
META_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">\n?')
SCRIPT_HASH = re.compile(r"'sha256-[A-Za-z0-9+/=]+'")


@cache
def style() -> str:
    return text_of(DISPLAYED / "style.css") + text_of(PAGES / "browse.css")


@cache
def script(*names: str) -> str:
    """Files of ``pages/`` as one script."""
    return as_function([PAGES / name for name in names])


@cache
def policy(code: str = "") -> str:
    """The security policy of a page whose script is ``code``."""
    scripts = hash_source(code) if code else "'none'"
    return (
        f"default-src 'none'; style-src {hash_source(style())}; script-src {scripts}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )


def render(template: str, **content) -> str:
    """A page or a part of one; everything in its ``content`` is escaped."""
    return environment(PAGES).get_template(template).render(**plain(content))


def whole(template: str, code: str = "", **content) -> str:
    """A page with its style, and ``code`` as its script."""
    fixed = {"style": Markup(style()), "script": Markup(code)}
    return environment(PAGES).get_template(template).render(**plain(content), **fixed)


def in_frame(page: str, code: str, **content) -> tuple[str, str]:
    """A page of ``display`` with the server's own parts at the beginning, and its security policy.

    The policy is removed from the page, as it becomes a header of the answer, which also allows ``code``. It allows all
    inline styles, as the widths of bars are in ``style`` attributes, which a policy cannot list one by one.
    """
    found = META_POLICY.search(page)
    own = " ".join(SCRIPT_HASH.findall(html.unescape(found[1]))) if found else ""
    parts = render("frame.html.jinja", **content)
    head = f"<style>{text_of(PAGES / 'browse.css')}</style>\n</head>"
    page = META_POLICY.sub("", page, count=1).replace("</head>", head, 1)
    page = page.replace("<body>", f"<body>\n{parts}", 1).replace("</body>", f"<script>{code}</script>\n</body>", 1)
    return page, (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {own} {hash_source(code)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
