"""Marks stay with the source rows of a run, in the folder or among the user's own data."""

import shutil
import sqlite3

import pytest

from chat_logits.browse.marks import FILE, Mark, Marks, marks_file
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import StoredDataset, open_dataset


def test_marks_come_with_a_copy_of_the_folder(quick_run, tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    shutil.copytree(quick_run, first)
    dataset = open_dataset(str(first))
    assert marks_file(dataset) == first / FILE
    marks = Marks(marks_file(dataset), dataset.manifest.fingerprint)
    assert marks.all() == {} and not (first / FILE).exists()  # looking makes no file
    marks.put(3, Mark("see “this”", ["a", "b"]))
    marks.put(4, Mark("", ["a"]))
    marks.put(4, Mark("", []))
    shutil.copytree(first, copy)
    again = open_dataset(str(copy))
    assert Marks(marks_file(again), again.manifest.fingerprint).all() == {3: Mark("see “this”", ["a", "b"])}
    assert Marks(first / FILE, "another run").all() == {}


def test_a_hub_datasets_marks_are_among_the_users_data(quick_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    dataset = open_dataset(str(quick_run))
    remote = StoredDataset("user/x", "0" * 40, dataset.manifest, dataset.shards)
    assert marks_file(remote) == tmp_path / "chat-logits" / FILE
    Marks(marks_file(remote), "f").put(1, Mark("n", []))
    assert Marks(marks_file(remote), "f").all() == {1: Mark("n", [])}


def test_what_is_no_file_of_marks_is_refused(tmp_path):
    file = tmp_path / FILE
    file.write_text("something else, of more than a hundred characters " * 20)
    with pytest.raises(ToolkitError, match=FILE):
        Marks(file, "f").all()
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ToolkitError, match="move it away"):
        Marks(file, "f").put(1, Mark("n", []))
    assert not (tmp_path / "elsewhere").exists()
    file.unlink()
    Marks(file, "f").put(1, Mark("n", []))
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE marks SET tags = '7'")
    with pytest.raises(ToolkitError, match="not what was written"):
        Marks(file, "f").all()


@pytest.mark.parametrize("content", [("n" * 5000, []), (1, []), ("", ["t" * 61]), ("", "tag"), ("", [1]), (None, [])])
def test_a_mark_is_a_text_and_tags(content):
    with pytest.raises(UsageError):
        Mark.read(*content)


def test_tags_are_in_order_and_each_once():
    assert Mark.read(" n ", ["b", " a  c ", "b", ""]) == Mark("n", ["a c", "b"])
