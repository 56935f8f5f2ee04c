"""The Ray that workers run on: started on this machine alone, or a cluster that is there; what each worker takes."""

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.config import ExtractConfig

HERE = Path(__file__).resolve().parents[2]
CODE = (
    "logit_codec.py",
    "chat_logits/**/*.py",
    "chat_logits/display/pages/*",
    "templates/*",
    "chat_logits/templates/*",
)  # and nothing else of a checkout: secrets and outputs lie about in them
STORE = 128 * 2**20  # bytes of Ray's object store, which only numbers go through


@dataclass(frozen=True)
class Share:
    """What one worker takes of the cluster: ``options`` of its actor, ``gpus`` among them. ``room`` is for so many.

    ``head`` is the HOST:PORT without which there is no cluster.
    """

    options: dict
    gpus: int
    room: int
    head: str


def connect(config: ExtractConfig) -> Share:
    """Start Ray on this machine, or connect to the cluster, which ``ray_address.reach`` has found.

    Raises UsageError where accelerators or room for workers are missing.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without GPUs: leave them what they see
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # tracebacks of calls that ended with a lost worker
    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _own_signals():
        if config.ray_address:
            _join(config.ray_address, common)
        else:
            path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
            runtime = {"env_vars": {"PYTHONPATH": path}}
            _start_here({"runtime_env": runtime, "object_store_memory": STORE, **common})
    try:
        return _share(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    except UsageError:
        ray.shutdown()
        raise


def _start_here(options: dict) -> None:
    try:
        ray.init(address="local", include_dashboard=False, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ToolkitError(
            f"Ray does not start on this machine: {first_line(error)}. It works in a folder below TMPDIR, or below "
            "RAY_TMPDIR if that is set."
        ) from error


def _join(address: str, common: dict) -> None:
    with tempfile.TemporaryDirectory() as code:
        copy_code(HERE, Path(code))
        try:
            ray.init(address=address, runtime_env={"working_dir": code}, **common)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ToolkitError(f"--ray_address {address}: {first_line(error)}") from error


def copy_code(source: Path, target: Path) -> None:
    """Copy what workers need of this toolkit."""
    for file in (file for pattern in CODE for file in source.glob(pattern) if file.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _share(config: ExtractConfig, nodes: list[dict[str, float]]) -> Share:
    """What one worker takes: accelerators, or a CPU where there are none or none is wanted.

    It is told of more threads than the one CPU that Ray keeps for it: a larger share might not fit on what is left when
    a machine is gone.
    """
    gpus, cpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("GPU", "CPU"))
    workers = config.num_workers
    _refuse_without_gpus(config, gpus, cpus)
    wanted = config.gpus_per_worker if gpus and config.device != "cpu" else 0
    room = sum(int(node.get("GPU", 0)) // wanted for node in nodes) if wanted else cpus
    if workers > room and not config.ray_address:
        found = f"{gpus} GPUs" if wanted else f"{cpus} CPUs and no GPU"
        raise UsageError(f"--num_workers {workers}: this machine has {found}, room for {room}")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus // workers))
    options = {
        "num_gpus": wanted,
        "num_cpus": 1,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, **_endpoint()}},
    }
    return Share(options, wanted, room, ray.get_runtime_context().gcs_address)


def _refuse_without_gpus(config: ExtractConfig, gpus: int, cpus: int) -> None:
    """A cluster's GPUs may be on their way, and a run that has begun on CPUs would stay there."""
    if gpus or config.device == "cpu":
        return
    if config.ray_address:
        raise UsageError(
            f"--ray_address {config.ray_address}: that cluster has {cpus} CPUs and no GPU yet. Wait for machines "
            "with some, or give --device cpu."
        )
    if config.gpus_per_worker > 1:
        raise UsageError(f"--gpus_per_worker {config.gpus_per_worker}: this machine has no GPU")


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
