"""The source of a run, which must stay what it was, and apart from what the run writes."""

import pytest
from runs import options_for

import extract_logits
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction import shard_computer
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run import extract
from chat_logits.storage.dataset import open_dataset


@pytest.fixture
def source(calm_source, tmp_path):
    """The first 30 rows of the runs' source, in a folder of their own."""
    (tmp_path / "source").mkdir()
    lines = calm_source.read_text(encoding="utf-8").splitlines(keepends=True)[:30]
    (tmp_path / "source" / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "source" / "chats.jsonl"


@pytest.mark.parametrize("change", ["cut", "reversed", "longer"])
def test_a_source_that_changes_on_the_way_is_no_finished_run(quick_model, source, tmp_path, monkeypatch, change):
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = {"cut": lines[:10], "reversed": lines[::-1], "longer": [*lines, lines[0]]}[change]
    write, written = shard_computer.write_shard, []

    def write_and_change(*arguments):
        entry = write(*arguments)
        if not written:
            source.write_text("".join(changed), encoding="utf-8")
        written.append(entry)
        return entry

    monkeypatch.setattr(shard_computer, "write_shard", write_and_change)
    config = ExtractConfig(**options_for(quick_model, source, tmp_path / "out"))
    with pytest.raises(ToolkitError, match="its files have changed since the run began"):
        extract(config)
    assert written and not open_dataset(str(tmp_path / "out")).is_finished
    with pytest.raises(UsageError, match="have changed"):
        extract(config)


def test_a_run_does_not_write_into_its_source(quick_model, source, tmp_path):
    folder = source.parent
    (tmp_path / "link").symlink_to(folder)
    for out, dataset in ((folder, folder), (folder / "out", folder), (tmp_path / "link" / "out", folder)):
        with pytest.raises(UsageError, match="lie one within the other"):
            extract(ExtractConfig(**options_for(quick_model, dataset, out)))
    with pytest.raises(UsageError, match="lie one within the other"):  # it would be set aside, and removed at the end
        extract(ExtractConfig(**options_for(quick_model, source, folder), overwrite=True))
    assert [path.name for path in folder.iterdir()] == ["chats.jsonl"]


def test_a_plan_of_a_dataset_needs_a_model(source, capsys):
    assert extract_logits.main(["--dataset_id", str(source), "--plan"]) == 2
    assert "--model_id" in capsys.readouterr().err
