"""A cache of the Hub's libraries that nothing can be written to is told, and not blamed on what was to be read."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest

from chat_logits.data.source import open_source
from chat_logits.errors import UsageError
from chat_logits.hub_errors import CACHES, explain_hub_error, redact


@pytest.mark.parametrize(
    ("variable", "folder", "inner"), [("HF_DATASETS_CACHE", "file", ""), ("HF_HOME", "file/inner", "datasets")]
)
def test_a_source_is_not_blamed_for_a_cache_that_cannot_be_made(tmp_path, monkeypatch, variable, folder, inner):
    import datasets
    from huggingface_hub import constants

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / folder))  # which both libraries read when imported
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / folder / inner)
    with pytest.raises(UsageError) as told:
        open_source(str(tmp_path / "chat.jsonl"))
    wanted = f"{tmp_path / folder}: a cache cannot be written there (Not a directory). Set {variable} to a folder that"
    assert str(told.value) == f"{wanted} can be written."
    assert redact(str(told.value)) == str(told.value)  # the variable's name is no token


def test_a_source_is_not_blamed_for_a_cache_that_cannot_be_locked(tmp_path, monkeypatch):
    """As NFS without its lock daemon."""
    import datasets
    from huggingface_hub import constants

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    pyarrow.parquet.write_table(pyarrow.table({"text": ["Hi"]}), tmp_path / "text.parquet")
    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", "/nfs/cache")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UsageError) as told:
        open_source(str(tmp_path / "text.parquet"))
    fault = "the file system of this cache does not lock files (No locks available). Set it to a folder on a local"
    assert str(told.value) == f"HF_DATASETS_CACHE /nfs/cache or HF_HOME {tmp_path}: {fault} disk."


@pytest.mark.parametrize(
    ("kind", "place", "is_told"),
    [
        (PermissionError, "hub/models--x/blobs", True),
        (PermissionError, "elsewhere", False),
        (FileNotFoundError, "hub/models--x/snapshots", False),  # something is missing in a cache that is well
    ],
)
def test_what_fails_elsewhere_is_not_blamed_on_a_cache(tmp_path, monkeypatch, kind, place, is_told):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    number = {PermissionError: 13, FileNotFoundError: 2}[kind]
    error = RuntimeError("wrapped")
    error.__cause__ = kind(number, os.strerror(number), str(Path(tmp_path, place)))
    told = str(explain_hub_error(error, "model x"))
    cache = f"{tmp_path / 'hub'}: a cache cannot be written there (Permission denied)"
    assert told == (f"{cache}. Set HF_HUB_CACHE to a folder that can be written." if is_told else "model x: wrapped")
