"""The server of a dataset's pages, from its start to Ctrl-C."""

import asyncio
import logging
import os
import socket
import sys
import threading
import webbrowser

from tqdm import tqdm

from chat_logits.browse import HOST
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.scratch import scratch_folder
from chat_logits.storage.dataset import StoredDataset

logger = logging.getLogger(__name__)
PORT, TRIED = 8765, 20  # the default port, and how many ports to try from there on
INSTALL = "pip install 'duckdb>=1.4' 'starlette>=1' 'uvicorn>=0.40'"


def browse(
    dataset: StoredDataset,
    tokenizer,
    other: StoredDataset | None = None,
    other_tokenizer=None,
    chat_template: str | None = None,
    port: int | None = None,
    opens: bool = True,
) -> None:
    """Serve the pages of a dataset on this machine until SIGINT; with ``opens``, open the browser at them.

    ``other`` is a dataset to compare it with, ``other_tokenizer`` its tokenizer if that is a different one;
    ``chat_template`` is as for ``RowAligner``; the default ``port`` is 8765, or the next one that is free. Raises
    ToolkitError if a package is missing, UsageError if the port is taken.
    """
    refuse_missing()
    from chat_logits.browse.app import Site
    from chat_logits.browse.browsed import Browsed

    with listening(port) as listener, scratch_folder() as folder:
        browsed = Browsed(dataset, tokenizer, folder, chat_template)
        browsed.read_numbers(_bar)
        site = Site(browsed, other, other_tokenizer)
        port = listener.getsockname()[1]
        address = f"http://{HOST}:{port}/"
        print(f"{dataset.dataset_id} is at {address} (Ctrl-C ends it)", flush=True)
        if opens:
            _open(address)
        try:
            site.prepare()  # while the browser starts
            browsed.begin()
            _serve(server_of(site.app(port)), listener)
        except KeyboardInterrupt:
            print("\nEnded.")
        finally:
            browsed.index.close()


def _serve(server, listener: socket.socket) -> None:
    """Serve until SIGINT; if this thread already has an event loop, as in a notebook, in a thread with its own loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return server.run(sockets=[listener])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        thread.join()
    finally:
        server.should_exit = True
        thread.join()


def refuse_missing() -> None:
    """Raise ToolkitError if a package of the extra ``browse`` is missing."""
    for name in ("duckdb", "starlette", "uvicorn"):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ToolkitError(f"{name} is not installed, which browsing needs: {INSTALL}") from error


def listening(port: int | None) -> socket.socket:
    """A socket that listens at this port of this machine. Raises UsageError if that is not possible."""
    for number in [port] if port is not None else range(PORT, PORT + TRIED):
        listener = socket.socket()
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, number))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
    named = f"`port` {port}" if port is not None else f"ports {PORT} to {PORT + TRIED - 1}"
    raise UsageError(f"{named}: cannot listen on {HOST} there ({reason}); give another port, or 0 for any")


def server_of(app):
    """A server for ``app``: ``run(sockets=[…])`` ends with SIGINT or SIGTERM."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _bar(steps, total: int):
    return tqdm(steps, "Reading the numbers", total, unit=" shards", leave=False, delay=1, dynamic_ncols=True)


def _open(address: str) -> None:
    """Open the browser, in a thread, as some calls block; not one that runs in the terminal."""
    has_screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_screen:
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
