"""A hash of the files' contents, used as the revision if there is no Hub commit.

Files of gigabytes are not read at every start: a file's hash is cached and reused while its path, size and times are
unchanged.
"""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

GRAIN = 3.0  # seconds: a file changed this recently may change again with the same time; FAT's times are 2 s apart
REMEMBERED_FILES = 100_000
LOCK_PATIENCE = 10.0  # seconds

_known: dict[str, list] = {}  # path: [size, mtime_ns, ctime_ns, sha256]


def hash_files(path: str | Path) -> str:
    """SHA-256 (hex) over the names and contents of a file, or of all files in a folder, hidden ones left out."""
    path = Path(path)
    if path.is_file():
        return _hashes([path])[0]
    files = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    shown = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)}
    digest = hashlib.sha256()
    for name, sha256 in zip(shown, _hashes(list(shown.values())), strict=True):
        digest.update(f"{name.as_posix()}\0{sha256}\n".encode())
    return digest.hexdigest()


def known_hashes() -> dict[str, list]:
    """The hashes that this process knows, for ``remember_hashes`` in other processes that see the same files."""
    return dict(_known)


def remember_hashes(hashes: dict[str, list]) -> None:
    """Take over the hashes that another process knows, until this one ends."""
    _known.update(hashes)


def _hashes(files: list[Path]) -> list[str]:
    """The SHA-256 of each file. Hashes that had to be computed are cached for other processes."""
    stamps = [_stamp(file) for file in files]
    if any(_recall(_known, stamp) is None for stamp in stamps):
        remembered = _read_memory()
        _known.update({stamp[0]: remembered[stamp[0]] for stamp in stamps if _recall(remembered, stamp)})
    read: dict[str, list] = {}
    hashes = [
        _recall(_known, stamp) or _hash_file(file, stamp, read) for file, stamp in zip(files, stamps, strict=True)
    ]
    if read:
        _known.update(read)
        _write_memory(read)
    return hashes


def _stamp(file: Path) -> tuple:
    """Resolved path, size, and the times of the last changes, in ns.

    Tools that unpack archives set the time of a file's contents (mtime); the time of its inode (ctime) cannot be set.
    """
    status = file.stat()
    return str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _recall(hashes: dict[str, list], stamp: tuple) -> str | None:
    path, *state = stamp
    *known, sha256 = hashes.get(path, [None])
    return sha256 if known == state else None


def _hash_file(file: Path, stamp: tuple, read: dict[str, list]) -> str:
    """A file's SHA-256, from its contents. It is added to ``read`` if it may be cached."""
    settled = max(stamp[2:]) < time.time_ns() - GRAIN * 1e9
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if settled and _stamp(file) == stamp:
        read[stamp[0]] = [*stamp[1:], sha256]
    return sha256


def _memory_file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "content_hashes.json"


def _read_memory() -> dict[str, list]:
    """The hashes that earlier processes cached; none if the file is missing or damaged."""
    try:
        remembered = json.loads(_memory_file().read_bytes())
        return {path: entry for path, entry in remembered.items() if len(entry) == 4 and len(entry[3]) == 64}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_memory(read: dict[str, list]) -> None:
    """Merge hashes into the cache file, which others may have changed. If that cannot be written, it is no error."""
    from filelock import FileLock

    path = _memory_file()
    with suppress(OSError, NotImplementedError):  # the second: a file system without locks
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_PATIENCE):
            merged = {**_read_memory(), **read}
            new = path.with_name(f"{path.name}.new")
            new.write_text(json.dumps(dict(list(merged.items())[-REMEMBERED_FILES:])), encoding="utf-8")
            new.replace(path)
