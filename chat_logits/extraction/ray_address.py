"""Whether a Ray cluster answers at an address, asked from a process beside this one.

Within this one, Ray would try for minutes, say so in many lines, and be bound from its import on to one way of proving
who it is.
"""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time

from chat_logits.errors import ToolkitError, UsageError

FORM = re.compile(r"([^\s/:]+|\[[0-9a-fA-F:]+\]):([1-9]\d{0,4})")
PATIENCE = 30.0  # seconds to reach a cluster
# To find out whether anybody listens: times, seconds between them, seconds each. Ray gives a cluster up after 60.
TRIES, PAUSE, ANSWER = 4, 6.0, 3.0
MODE = "RAY_AUTH_MODE"
START = "`ray start --head` starts a cluster, and prints its address."


def require_ray() -> None:
    """Raise UsageError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("workers need Ray, which is not installed: pip install -r requirements-ray.txt")


def check_address(address: str) -> None:
    """Raise UsageError for what is no address of a cluster."""
    if address.startswith("ray://"):
        raise UsageError(f"`ray_address` {address}: expected HOST:PORT as `ray start` prints it, without ray://")
    found = FORM.fullmatch(address)
    if address != "auto" and not (found and int(found[2]) < 2**16):
        raise UsageError(f"`ray_address` {address or repr(address)}: expected HOST:PORT or auto")


def reach(address: str) -> None:
    """Raise ToolkitError where no cluster answers. To be called before Ray is imported.

    Clusters ask for a token where their machines had one as they were started (``~/.ray/auth_token``, which Ray also
    makes for its own use on a single machine). ``RAY_AUTH_MODE`` is set here where it is open and the cluster asks.
    """
    if address != "auto" and not listens(address, 1):
        raise ToolkitError(f"`ray_address` {address}: no Ray cluster answers there. {START}")
    answer = _ask(address)
    if "InvalidAuthToken" in answer and MODE not in os.environ:
        answer = _ask(address, {MODE: "token"})
        if not answer:
            os.environ[MODE] = "token"
    if not answer:
        return
    what = f"`ray_address` {address}"
    if "InvalidAuthToken" in answer or "AuthenticationError" in answer:
        raise ToolkitError(
            f"{what}: that cluster asks for a token, and this machine's is missing or another one. Copy "
            "~/.ray/auth_token from the cluster's first machine, or start the cluster with RAY_AUTH_MODE=disabled."
        )
    if address == "auto":
        raise ToolkitError(f"{what}: this machine is part of no cluster. {START}")
    raise ToolkitError(f"{what}: no Ray cluster answers there. {START}")


def listens(address: str, tries: int = TRIES) -> bool:
    """Whether anything takes connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    for attempt in range(tries):
        time.sleep(PAUSE if attempt else 0)
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
            return True
        except OSError:
            continue
    return False


def _ask(address: str, more: dict[str, str] | None = None) -> str:
    """What `ray status` complains of, nothing where it has its answer."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        asked = subprocess.run(
            command, env={**os.environ, **(more or {})}, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "no answer in time"
    return asked.stderr + asked.stdout if asked.returncode else ""
