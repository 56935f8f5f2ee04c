"""The cores and memory that this process may use, with the limits of Linux's control groups (containers, Slurm); and
the signals by which the system asks it to end.

A line of /proc/self/cgroup is "0::/path" for version 2, "number:controllers:/path" for version 1. In a container the
path may be the host's; the container's own group is then at the root.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from chat_logits.errors import ToolkitError

PROC, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_memory() -> int:
    """Bytes of memory, used or free. Raises ToolkitError on Windows, where it is not known."""
    if not hasattr(os, "sysconf"):
        raise ToolkitError("this runs on Linux and macOS; on Windows, install it within WSL (Ubuntu, say)")
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *memory_limits()])


def usable_cores() -> int:
    """Cores that this process may run on, or that its quota of CPU time is worth if that is less; at least one."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([there, *core_limits()])))


def stopping_signals() -> list[signal.Signals]:
    """Signals that ask a process to end: Ctrl-C, kill, and a closed terminal, unless nohup set that to be ignored."""
    closed = getattr(signal, "SIGHUP", None)
    heard = [] if closed is None or signal.getsignal(closed) == signal.SIG_IGN else [closed]
    return [signal.SIGINT, signal.SIGTERM, *heard]


def ignore_if_repeated(number: int) -> None:
    """Ignore further signals of this number if it is SIGHUP: when a terminal closes, shell and system each send one."""
    if number == getattr(signal, "SIGHUP", None):
        signal.signal(number, signal.SIG_IGN)


def memory_limits(proc: Path = PROC, root: Path = ROOT) -> Iterator[int]:
    """The groups' memory limits in bytes; nothing for a group without a limit."""
    for folder in _groups("memory", proc, root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2, of version 1
            if (limit := _text(folder / name)) not in ("", "max"):
                yield int(limit)


def core_limits(proc: Path = PROC, root: Path = ROOT) -> Iterator[float]:
    """Cores that the groups' quotas of CPU time are worth, such as 2.5; nothing for a group without a quota."""
    for folder in _groups("cpu", proc, root):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2
        quota = quota or _text(folder / "cpu.cfs_quota_us")
        period = period or _text(folder / "cpu.cfs_period_us")
        if quota not in ("", "max", "-1"):
            yield int(quota) / int(period)


def _groups(controller: str, proc: Path, root: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in for a controller, and of their parents."""
    for line in proc.read_text().splitlines() if proc.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounted = root / controller if controllers else root
        group = mounted / path.strip("/")
        yield from (group, *group.parents[: len(group.relative_to(mounted).parts)])


def _text(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
