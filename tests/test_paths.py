"""Names that may be paths, told of by what lies near them."""

import pytest

from chat_logits.paths import near_here


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("data/chats.jsnl", " (no such file or folder here, but data/chats.jsonl)"),
        ("data/other", " (no such file or folder here)"),
        ("dat", " (no such file or folder here, but data)"),
        ("chats.jsnl", ""),
        ("user/chats", ""),
    ],
)
def test_a_hub_id_that_is_like_a_path_here_is_told_so(name, note, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert near_here(name) == note
