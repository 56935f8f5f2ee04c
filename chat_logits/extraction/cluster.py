"""The Ray cluster for the workers: checks that it answers, starts or joins it, and decides what each worker takes.

``find_ray`` checks the cluster from a separate process. In this process, Ray would retry for minutes with long logs,
and its authentication mode would be fixed at import; so nothing here imports Ray before that.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from chat_logits.data.templates import SHIPPED
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.words import first_line

PATIENCE = 30.0  # seconds for a cluster to answer
# To find out whether anything listens: attempts, seconds between them, timeout of each in seconds. Ray gives up on a
# head after 60 seconds.
TRIES, PAUSE, ANSWER = 4, 6.0, 3.0
TOKEN_MODE = "RAY_AUTH_MODE"
START = "`ray start --head` starts a cluster, and prints its address."
DEFAULTS = {  # environment variables
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without GPUs see those of their machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # no tracebacks of calls that ended with a lost worker
}
STORE = 128 * 2**20  # bytes of Ray's object store, which carries only numbers


@dataclass(frozen=True)
class Share:
    """What one worker takes of the cluster: ``options`` of its actor; ``described`` says in words what all take.

    ``head`` is the HOST:PORT of the cluster's head.
    """

    options: dict
    described: str
    head: str


def find_ray(address: str | None) -> None:
    """Raise UsageError if Ray is not installed, ToolkitError if no cluster answers at an address.

    A cluster asks for a token if its machines had one when they were started (``~/.ray/auth_token``, which Ray also
    creates for its own use on a single machine). If the cluster asks and ``RAY_AUTH_MODE`` is not set, it is set here.
    """
    if find_spec("ray") is None:
        raise UsageError("workers need Ray, which is not installed: pip install -r requirements-ray.txt")
    if not address:
        return
    complaint = _complaint(address) if address == "auto" or listens(address, 1) else "nothing listens"
    if "InvalidAuthToken" in complaint and TOKEN_MODE not in os.environ:
        os.environ[TOKEN_MODE] = "token"
        complaint = _complaint(address)
    if "InvalidAuthToken" in complaint or "AuthenticationError" in complaint:
        raise ToolkitError(
            f"`ray_address` {address}: that cluster asks for a token, and this machine's is missing or another one. "
            "Copy ~/.ray/auth_token from the cluster's first machine, or start the cluster with RAY_AUTH_MODE=disabled."
        )
    if complaint:
        missing = "this machine is not part of a cluster" if address == "auto" else "no Ray cluster answers there"
        raise ToolkitError(f"`ray_address` {address}: {missing}. {START}")


def _complaint(address: str) -> str:
    """The error output of `ray status`, empty if it succeeds."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "no answer in time"
    return asked.stderr + asked.stdout if asked.returncode else ""


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


def connect(config: ExtractConfig) -> Share:
    """Start Ray on this machine, or connect to the cluster that ``find_ray`` has found.

    Raises UsageError if accelerators or room for workers are missing, ToolkitError if Ray does not start.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _start(config.ray_address)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own
    try:
        return _share(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    except UsageError:
        ray.shutdown()
        raise


def _start(address: str | None) -> None:
    """Start Ray, or join the cluster at the address, with this toolkit's code for the workers."""
    import ray

    alone = {} if address else {"include_dashboard": False, "object_store_memory": STORE}
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    with tempfile.TemporaryDirectory() as code:
        copy_code(Path(code))
        try:
            ray.init(address=address or "local", runtime_env={"working_dir": code}, **alone, **quiet)
        except Exception as error:  # Ray raises a plain Exception if its processes do not start
            where = f"`ray_address` {address}" if address else "Ray does not start on this machine"
            below = "" if address else ". It works in a folder below TMPDIR, or below RAY_TMPDIR if that is set."
            raise ToolkitError(f"{where}: {first_line(error)}{below}") from error


def copy_code(target: Path) -> None:
    """Copy only this toolkit's files: next to it there may be outputs, secrets or other installed packages."""
    import logit_codec  # with NumPy, which nothing else here needs

    package = Path(__file__).resolve().parents[1]
    places = {file: file.relative_to(package.parent) for file in [*package.rglob("*.py"), *SHIPPED.glob("*.jinja")]}
    places[Path(logit_codec.__file__)] = Path("logit_codec.py")
    for file, place in places.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / place)


def _share(config: ExtractConfig, nodes: list[dict[str, float]]) -> Share:
    """What one worker takes: accelerators of one machine, or CPUs if there are none or none is wanted."""
    import ray

    workers = config.num_workers
    gpus, cpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("GPU", "CPU"))
    wanted = _gpus_per_worker(config, gpus, cpus)
    kind, taken = ("GPU", wanted) if wanted else ("CPU", config.tensor_parallel)
    there = [int(node.get(kind, 0)) for node in nodes]
    room = sum(count // taken for count in there)
    processes = f"with {config.tensor_parallel} processes " if config.tensor_parallel > 1 else ""
    if workers > room and not config.ray_address:
        has = f"{gpus} GPUs" if wanted else f"{cpus} CPUs and no GPU"
        each = f", each {processes}".rstrip() if processes else ""
        raise UsageError(f"`num_workers` {workers}: this machine has {has}, room for {room}{each}")
    if taken > 1 and not room:
        raise _no_machine(config, taken, kind, max(there))
    on = f"on {wanted} GPU{'s' * (wanted > 1)}" if wanted else "on CPUs"
    now = f" (there is room for {room} now, the others begin when there is more)" if workers > room else ""
    described = f"{workers} worker{'s' * (workers > 1)} on Ray, each {processes}{on}{now}"
    options = _actor_options(wanted, 1 if wanted else taken, max(1, cpus // workers))
    return Share(options, described, ray.get_runtime_context().gcs_address)


def _no_machine(config: ExtractConfig, taken: int, kind: str, most: int) -> UsageError:
    """The error if no machine has room for a worker, for which the run would wait forever."""
    name = "tensor_parallel" if config.tensor_parallel > 1 else "gpus_per_worker"
    return UsageError(
        f"`{name}` {taken}: a worker is on one machine, and none of `ray_address` {config.ray_address} has {taken} "
        f"{kind}s; the most that one has is {most}. Give less, or wait for such a machine."
    )


def _gpus_per_worker(config: ExtractConfig, gpus: int, cpus: int) -> int:
    """The number of GPUs that a worker takes. Raises UsageError if it needs some and there are none."""
    if config.device == "cpu":
        return 0
    if not gpus and config.ray_address:  # machines with GPUs may join later, but the run would stay on CPUs
        raise UsageError(
            f"`ray_address` {config.ray_address}: that cluster has {cpus} CPUs and no GPU yet. Wait for machines with "
            "some, or give `device` cpu."
        )
    if not gpus and config.gpus_per_worker > 1:
        raise UsageError(f"`gpus_per_worker` {config.gpus_per_worker}: this machine has no GPU")
    return config.devices_per_worker if gpus else 0


def _actor_options(gpus: int, cpus: int, threads: int) -> dict:
    """The Ray options of a worker with so many GPUs; all that an actor takes is on one machine.

    It gets more ``threads`` than the ``cpus`` that Ray reserves for it: after the loss of a machine, a larger
    reservation might not fit on the others.
    """
    variables = {"OMP_NUM_THREADS": str(threads)}
    variables |= {name: os.environ[name] for name in ("OMP_NUM_THREADS", "HF_ENDPOINT") if os.environ.get(name)}
    return {
        "num_gpus": gpus,
        "num_cpus": cpus,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": variables},
        "max_restarts": -1,  # as often as it takes, on another machine if need be
        "max_task_retries": -1,  # except for methods that set their own
    }
