"""A dataset's server in a thread of the test's own process, and questions to it over plain HTTP."""

import http.client
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.browse.app import Site
from chat_logits.browse.browsed import Browsed
from chat_logits.browse.server import listening, server_of
from chat_logits.storage.dataset import open_dataset


@contextmanager
def served(folder, scratch: Path, other=None, begins: bool = True):
    """The server of a dataset, with its ``address``, ``port``, ``token``, ``browsed`` and ``site``, all of it read.

    ``other`` is a dataset beside it with the same tokenizer: a folder, or a ``StoredDataset``.
    """
    dataset, tokenizer = open_with_tokenizer(str(folder))
    browsed = Browsed(dataset, tokenizer, scratch)
    browsed.read_numbers(lambda steps, total: steps)  # noqa: ARG005
    if begins:
        browsed.begin()
        assert browsed.texts.finished.wait(300) and browsed.summary.finished.wait(300)
    beside = open_dataset(str(other)) if isinstance(other, str | Path) else other
    site = Site(browsed, beside)
    listener = listening(0)
    port = listener.getsockname()[1]
    server = server_of(site.app(port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(
            address=f"http://127.0.0.1:{port}", port=port, token=site.token, browsed=browsed, site=site
        )
    finally:
        server.should_exit = True
        thread.join(60)
        browsed.index.close()
        listener.close()


@contextmanager
def pages(browser, server, usual: dict):
    """Opens an address of the server; what a page asks for, and complains of, is kept beside it."""
    contexts = []

    def open_page(path="/", viewport=usual, scheme="light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(server.address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()


def ask(port: int, path: str, method: str = "GET", body: str | None = None, **headers: str):
    """The answer's status, headers and text; ``headers`` in Python's spelling, ``host`` among them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named.setdefault("host", f"127.0.0.1:{port}")
    try:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()
