"""Marks stay with the source rows of a run, in the folder or among the user's own data."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from served import served

from chat_logits.browse.index import Clock
from chat_logits.browse.marks import FILE, TABLE, Mark, Marks, marks_file
from chat_logits.browse.view import View
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


def test_without_a_home_there_are_no_marks_and_none_can_be_made(quick_run, monkeypatch):
    """A user that the system does not know, as in containers, and a dataset that is the Hub's."""

    def unknown(_kind):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(unknown))
    dataset = open_dataset(str(quick_run))
    marks = Marks(marks_file(StoredDataset("user/x", "0" * 40, dataset.manifest, dataset.shards)), "f")
    assert marks.all() == {}
    with pytest.raises(ToolkitError, match="marks"):
        marks.put(1, Mark("n", []))


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


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"
OTHERS = [
    f"CREATE VIEW marks AS {ENDLESS} SELECT 'f' AS fingerprint, n AS source_index, 'x' AS note, '[]' AS tags FROM r",
    "CREATE TABLE marks (fingerprint TEXT, source_index INTEGER, note TEXT AS (printf('%.900000000c', 1)), tags TEXT)",
    "CREATE VIRTUAL TABLE marks USING fts5(fingerprint, source_index, note, tags)",
    f"{TABLE}; CREATE TRIGGER t AFTER DELETE ON marks BEGIN DELETE FROM marks; END",
    f"{TABLE}; CREATE VIEW other AS SELECT 1",
]


@pytest.mark.parametrize("statements", OTHERS)
def test_a_file_with_more_than_a_table_of_marks_is_refused_unread(tmp_path, statements):
    """The first goes on for ever where it is read."""
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.executescript(statements)
    for use in (lambda marks: marks.all(), lambda marks: marks.put(1, Mark("n", []))):
        with pytest.raises(ToolkitError, match="more or other than a table of marks is in it; move it away"):
            use(Marks(tmp_path / FILE, "f"))


@pytest.mark.parametrize(
    "change",
    [
        "source_index = 1e300",
        "source_index = 'x'",
        "source_index = 1.5",
        "source_index = NULL",
        "tags = replace(hex(zeroblob(30000)), '00', '[')",
    ],
)
def test_marks_of_another_kind_are_refused(tmp_path, change):
    Marks(tmp_path / FILE, "f").put(1, Mark("n", []))
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(f"UPDATE marks SET {change}")
    with pytest.raises(ToolkitError, match="not what was written"):
        Marks(tmp_path / FILE, "f").all()


def test_marks_of_rows_that_the_dataset_lacks_are_left_out(quick_run, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(quick_run, folder)
    dataset = open_dataset(str(folder))
    marks = Marks(marks_file(dataset), dataset.manifest.fingerprint)
    marks.put(1, Mark("", ["here"]))
    for source_index in (-(2**63), 2**63 - 1):
        marks.put(source_index, Mark("", ["elsewhere"]))
    with served(folder, tmp_path, begins=False) as server:
        assert server.browsed.index.tags(Clock()) == ["here"]
        assert [source for _, source in server.browsed.index.chosen(View(marked=True), Clock())] == [1]
