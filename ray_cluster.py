"""The Ray that workers run on: started on this machine alone, or a cluster that is there; what each worker takes."""

import argparse
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import ToolkitError, UsageError

try:
    import ray
except ImportError as missing:
    raise UsageError("workers need Ray, which is not installed: pip install -r requirements-ray.txt") from missing

HERE = Path(__file__).resolve().parent
STORE = 128 * 2**20  # bytes of Ray's object store, which only numbers go through
PATIENCE = 10.0  # seconds to reach a cluster
NOT_SENT = ["tests", "docs", "notebooks", "benchmarks", "demo", ".git", ".venv", ".cache", "outputs"]


def connect(arguments: argparse.Namespace) -> dict:
    """Start Ray on this machine, or connect to the cluster. Gives what one worker takes of it."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without GPUs: leave them what they see
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # tracebacks of calls that ended with a lost worker
    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _own_signals():
        if arguments.ray_address:
            _refuse_silent(arguments.ray_address)
            code = {"working_dir": str(HERE), "excludes": NOT_SENT}
            try:
                ray.init(address=arguments.ray_address, runtime_env=code, **common)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ToolkitError(f"--ray_address {arguments.ray_address}: {first_line(error)}") from error
        else:
            path = {
                "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))}
            }
            ray.init(address="local", include_dashboard=False, object_store_memory=STORE, runtime_env=path, **common)
    return _share(arguments, ray.cluster_resources())


def _refuse_silent(address: str) -> None:
    """Raise ToolkitError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise UsageError(f"--ray_address {address}: expected HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError as error:
        raise ToolkitError(
            f"--ray_address {address}: nobody answers there ({error.strerror or error}). `ray start --head` prints the "
            "address of a cluster."
        ) from error


def _share(arguments: argparse.Namespace, there: dict[str, float]) -> dict:
    """What one worker takes: accelerators, or a CPU where there are none or none is wanted.

    It is told of more threads than the one CPU that Ray keeps for it: a larger share might not fit on what is left when
    a machine is gone.
    """
    workers, gpus, cpus = arguments.num_workers, int(there.get("GPU", 0)), int(there.get("CPU", 0))
    wanted = arguments.gpus_per_worker if gpus and arguments.device != "cpu" else 0
    room = gpus // wanted if wanted else cpus
    if workers > room and not arguments.ray_address:
        found = f"{gpus} GPUs" if wanted else f"{cpus} CPUs and no GPU"
        raise UsageError(f"--num_workers {workers}: this machine has {found}, room for {room}")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus // workers))
    return {
        "num_gpus": wanted,
        "num_cpus": 1,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, **_endpoint()}},
    }


def _endpoint() -> dict[str, str]:
    return {name: os.environ[name] for name in ("HF_ENDPOINT",) if name in os.environ}


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this command's way to end on SIGTERM: Ray sets its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def first_line(error: Exception) -> str:
    """What an error says, as far as one line goes."""
    return str(error).strip().partition("\n")[0][:300]
