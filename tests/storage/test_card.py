"""The card as the Hub reads it: its metadata through huggingface_hub's own tools, its snippets by running them."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import DatasetCard

from chat_logits.storage.card import arguments_in_code, card_metadata, render_card, run_state, size_category
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard_list import ShardEntry, read_shard_list

COMMITS = {"model_revision": "a" * 40, "dataset_revision": "b" * 40}
HUB = {"model_id": "org/model", "dataset_id": "org/questions", **COMMITS}


@pytest.fixture
def manifest(quick_run) -> Manifest:
    return Manifest.read(quick_run / "extraction.json", "here")


@pytest.fixture
def entries(quick_run) -> list[ShardEntry]:
    return read_shard_list(quick_run / "shards.json", "here").entries


def test_the_hub_reads_what_it_filters_and_links_by(manifest, entries):
    licenses = {"model": "mit", "dataset": "cc-by-4.0"}
    arguments = arguments_in_code("user/logits")
    card = DatasetCard(render_card(replace(manifest, licenses=licenses, **HUB), entries, arguments))
    assert card.data.to_dict() == {
        "license": "cc-by-4.0",
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
        "base_model": "org/model",
        "datasets": ["org/questions"],
        "configs": [
            {
                "config_name": "default",
                "description": run_state(replace(manifest, **HUB).fingerprint, entries),
                "data_files": [{"split": "train", "path": "data/*/train-*.parquet"}],
            }
        ],
        "tags": ["token-log-probabilities", "distillation"],
    }


def test_folders_on_somebodys_machine_link_to_nothing(manifest, entries):
    data = DatasetCard(render_card(manifest, entries)).data.to_dict()
    assert not {"base_model", "datasets", "license"} & data.keys()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, (None, None)),
        ("Apache-2.0", ("apache-2.0", None)),
        ("house rules", ("other", "house rules")),
        (["mit", "cc-by-4.0"], ("other", "mit, cc-by-4.0")),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_other(manifest, stated, expected):
    data = card_metadata(replace(manifest, licenses={"model": "mit", "dataset": stated}), []).to_dict()
    assert (data.get("license"), data.get("license_name")) == expected


def test_what_a_card_is_about_is_one_line_whatever_its_size(manifest):
    entry = ShardEntry("data/00000/train-00000.parquet", 10**7, 10**9, 1.0, 10**15)
    assert run_state(manifest.fingerprint, [entry] * 99_999) in render_card(manifest, [entry] * 99_999)


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (10_000, "10K<n<100K"), (99_999, "10K<n<100K"), (10**11, "100B<n<1T"), (10**13, "n>1T")],
)
def test_sizes_are_the_hubs_categories(rows, category):
    assert size_category(rows) == category


@pytest.mark.parametrize(
    ("repository", "named"),
    [
        ((), '"path/to/this/folder"'),
        (("user/logits", "main"), '"user/logits"'),
        (("a/b", "k64"), '"a/b", revision="k64"'),
    ],
)
def test_the_snippets_name_the_dataset_itself(manifest, entries, repository, named):
    card = render_card(manifest, entries, arguments_in_code(*repository))
    assert f"execute_analysis({named}, sample_index=0)" in card
    assert f'load_dataset({named}, split="train")[0]' in card


def test_the_snippets_run(quick_run, capsys):
    """With its path; the second imports one file of the toolkit."""
    card = (quick_run / "README.md").read_text(encoding="utf-8").replace("path/to/this/folder", str(quick_run))
    table, numbers = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert set(re.findall(r"^from (\w+)", numbers, re.MULTILINE)) == {"datasets", "logit_codec"}
    exec(table, {})
    assert "Detailed Token Analysis:" in capsys.readouterr().out
    names = {}
    exec(numbers, names)
    first = open_dataset(str(quick_run)).read_row(0)
    assert names["row"]["token_log_probs"] == first["token_log_probs"]
    assert len(names["position"].token_ids) > 1
