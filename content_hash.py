"""What stands in for a revision where there is no Hub commit: a hash of the files' contents."""

import hashlib
from pathlib import Path


def hash_files(path: str | Path) -> str:
    """SHA-256 (hex) over the names and contents of a file, or of all files in a folder, hidden ones left out."""
    path = Path(path)
    if path.is_file():
        return _hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{relative.as_posix()}\0{_hash_file(file)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
