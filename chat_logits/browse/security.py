"""Who may ask the server: a browser of this machine, for its own pages. Another site's page gets nothing."""

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response

from chat_logits.browse import HOST

TOKEN_HEADER = "x-browse-token"
OPEN = ("same-origin", "none")  # values of Sec-Fetch-Site: this server's own pages, and what the user has typed
READING = ("GET", "HEAD")
ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "x-frame-options": "DENY",
}
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
App = Callable[[Any, Any, Any], Awaitable[None]]


class Guard:
    """Middleware that refuses what is not asked by this server's own pages, and gives each answer its headers.

    A name that leads to this machine (DNS rebinding) is refused by the Host header, another site's request by what the
    browser says of it (Sec-Fetch-Site, Origin), and a change without the ``token`` that is in the pages alone.
    """

    def __init__(self, app: App, port: int, token: str):
        self._app, self._token = app, token
        self._hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        if port == 80:
            self._hosts |= {HOST, "localhost"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refused = (
            "no such protocol" if scope["type"] != "http" else self._refusal(scope["method"], Headers(scope=scope))
        )

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in {"content-security-policy": POLICY, **ALWAYS}.items():
                    headers.setdefault(name, value)
            await send(message)

        if refused is None:
            await self._app(scope, receive, sending)
        elif scope["type"] == "http":
            await _refused(refused)(scope, receive, sending)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        """Why a request is refused, None where it is not."""
        if headers.get("host") not in self._hosts:
            return "This server answers to its own address alone: a forwarded port must have the same number."
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin not in {f"http://{host}" for host in self._hosts}:
            return "This server answers its own pages alone."
        if site is not None and site not in OPEN and not _is_followed_link(method, headers):
            return "This server answers its own pages alone."
        if method in READING:
            return None
        if method != "POST":
            return "This server is asked by GET and POST."
        if not secrets.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self._token.encode()):
            return "This is changed from the server's own pages alone; reload the page."
        return None


def _is_followed_link(method: str, headers: Headers) -> bool:
    """Whether another site's page leads here, which shows it nothing: the page in its place is this server's."""
    mode, kind = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return method == "GET" and mode == "navigate" and kind == "document"


def _refused(reason: str) -> Response:
    return PlainTextResponse(reason + "\n", status_code=403)
