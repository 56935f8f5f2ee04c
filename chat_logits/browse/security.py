"""Who may use the server: a browser on this machine, from the server's own pages. Other sites' pages get nothing."""

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response

from chat_logits.browse import HOST

TOKEN_HEADER = "x-browse-token"
OPEN = ("same-origin", "none")  # values of Sec-Fetch-Site: this server's own pages, and addresses that the user typed
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
    """Middleware that refuses requests that do not come from this server's own pages, and adds security headers.

    It refuses another name that resolves to this machine (DNS rebinding) by the Host header, another site's request by
    the browser's headers (Sec-Fetch-Site, Origin), and a change without the ``token``, which only the pages have.
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
        """Why a request is refused, None if it is not."""
        if headers.get("host") not in self._hosts:
            return "This server only answers at its own address: a forwarded port must have the same number."
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin not in {f"http://{host}" for host in self._hosts}:
            return "This server only answers its own pages."
        if site is not None and site not in OPEN and not _is_followed_link(method, headers):
            return "This server only answers its own pages."
        if method in READING:
            return None
        if method != "POST":
            return "This server only accepts GET, HEAD and POST."
        if not secrets.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self._token.encode()):
            return "This can only be changed from the server's own pages; reload the page."
        return None


def _is_followed_link(method: str, headers: Headers) -> bool:
    """Whether the user followed a link here from another site's page, which cannot see the page that it opens."""
    mode, kind = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return method == "GET" and mode == "navigate" and kind == "document"


def _refused(reason: str) -> Response:
    return PlainTextResponse(reason + "\n", status_code=403)
