"""``extraction.json`` and ``shards.json``: what FORMAT.md says of them, and that nothing is lost on the way."""

import hashlib
import json
import math
import re
from dataclasses import replace

import pytest
from conftest import REPO

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.card import render_card
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.json_files import canonical, json_text, read_json
from chat_logits.storage.manifest import FINGERPRINT_KEYS, KEYS, Manifest, RunInputs, another_run
from chat_logits.storage.shard import write_shard
from chat_logits.storage.shard_list import ShardEntry, mean_nll, read_shard_list, shards_text
from chat_logits.storage.shard_reading import check_shard

FORMAT = (REPO / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture
def content(quick_run) -> dict:
    """What a run has written."""
    return json.loads((quick_run / "extraction.json").read_text(encoding="utf-8"))


def of(content: dict) -> Manifest:
    return Manifest.from_json(content, "here")


def test_a_file_that_is_read_is_written_with_the_same_bytes(quick_run):
    path = quick_run / "extraction.json"
    assert Manifest.read(path, "here").text == path.read_text(encoding="utf-8")


def test_keys_of_other_writers_are_kept(content):
    content = {**content, "versions": {"julia": "1.12"}, "comment": ["mine", None], "cluster": {"nodes": 3}}
    assert json.loads(of(content).text) == content


@pytest.mark.parametrize(
    "key", ["mask_source", "versions", "licenses", "batch_tokens", "batch_logit_rows", "prefix_cache"]
)
def test_keys_that_decide_no_rows_may_be_missing_and_stay_so(content, key):
    del content[key]
    manifest = of(content)
    assert getattr(manifest, key) is None and json.loads(manifest.text) == content


def test_the_keys_are_the_formats():
    (table,) = re.findall(r"`extraction.json` is one object with the keys\n\n(.*?)\n\n", FORMAT, re.DOTALL)
    listed = [key for line in table.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(KEYS) == sorted(listed)


def test_the_fingerprint_is_that_of_the_format(content):
    (listed,) = re.findall(
        r"The run's fingerprint is the SHA-256 .*?keys that decide the rows:(.*?)\.\n", FORMAT, re.DOTALL
    )
    keys = re.findall(r"`(\w+)`", listed)
    assert sorted(FINGERPRINT_KEYS) == sorted(keys)
    text = json.dumps({key: content[key] for key in keys}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert of(content).fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_the_fingerprint_follows_what_decides_the_rows(content):
    manifest = of(content)
    for key in ("top_k", "seed", "chat_template", "dtype", "skipped_token_ids"):
        assert replace(manifest, **{key: "other"}).fingerprint != manifest.fingerprint
    for key in ("versions", "batch_tokens", "model_id"):
        assert replace(manifest, **{key: "other"}).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("key", FINGERPRINT_KEYS)
def test_a_key_that_decides_the_rows_must_be_there(content, key):
    del content[key]
    with pytest.raises(ToolkitError, match=f"here: (extraction.json has no {key}|format_version None, expected 2)"):
        of(content)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("top_k", "64", "top_k '64', expected int of at least 1"),
        ("top_k", True, "top_k True, expected int of at least 1"),
        ("top_k", 0, "top_k 0, expected int of at least 1"),
        ("num_sampled", -1, "num_sampled -1, expected int of at least 0"),
        ("max_length", "512", r"max_length '512', expected int \| None"),
        ("chat_template", None, "chat_template None, expected str"),
        ("template_kwargs", [], r"template_kwargs \[\], expected dict"),
        ("skipped_token_ids", [1, "2"], r"skipped_token_ids \[1, '2'\], expected list of int"),
        ("prefix_cache", "yes", r"prefix_cache 'yes', expected bool \| None"),
        ("quantization", "awq", "quantization 'awq', expected an object with weights and config, or null"),
        (
            "quantization",
            {"weights": "as stored"},
            "quantization .*, expected an object with weights and config, or null",
        ),
        (
            "quantization",
            {"weights": 4, "config": {}},
            "quantization .*, expected an object with weights and config, or null",
        ),
        ("template_date", "2023-02-29", "template_date '2023-02-29', expected a day such as 2024-02-29, or null"),
        ("template_date", "today", "template_date 'today', expected a day such as 2024-02-29, or null"),
        ("template_date", 20240229, "template_date 20240229, expected a day such as 2024-02-29, or null"),
        ("split", ["train"] * 99, r"split \['train'.{32}, expected str$"),
    ],
)
def test_a_value_that_a_key_cannot_have_is_named(content, key, value, words):
    with pytest.raises(ToolkitError, match=f"here: extraction.json has {words}"):
        of({**content, key: value})


def test_a_day_is_one(content):
    assert of({**content, "template_date": "2024-02-29"}).template_date == "2024-02-29"


def test_numbers_may_be_written_either_way(content):
    assert of({**content, "top_p": 1}).as_json()["top_p"] == 1


# --- two runs ---


def test_runs_differ_in_the_keys_that_decide_the_rows(content):
    manifest = of(content)
    other = replace(manifest, top_k=3, system_prompt="Be brief.", versions={}, batch_tokens=1)
    assert other.differences(manifest) == ["top_k: 3 there, 64 here", "system_prompt: Be brief. there, null here"]
    assert manifest.differences(manifest) == []


def test_what_is_not_known_before_the_model_is_loaded_is_not_compared(content):
    manifest = of(content)
    inputs = RunInputs(**{key: getattr(manifest, key) for key in RunInputs.__dataclass_fields__})
    assert replace(manifest, dtype="float16", vocab_size=1).differences(inputs) == []
    assert replace(manifest, dtype="float16").differences(inputs, dtype="float32") == [
        "dtype: float16 there, float32 here"
    ]


def test_long_values_are_shown_from_where_they_differ(content):
    manifest = of({**content, "chat_template": "a" * 100 + "b" * 100})
    (text,) = manifest.differences(replace(manifest, chat_template="a" * 100 + "c" * 100))
    assert text == f"chat_template: from character 100, '{'a' * 10}{'b' * 30}' there, '{'a' * 10}{'c' * 30}' here"


@pytest.mark.parametrize(("id_key", "key"), [("model_id", "model_revision"), ("dataset_id", "dataset_revision")])
def test_other_models_and_sources_are_named_beside_their_revisions(content, id_key, key):
    manifest = of({**content, id_key: "user/a", key: "1" * 40})
    for changes, words in [
        ({id_key: "user/b", key: "2" * 40}, "user/a at 1111111111 there, user/b at 2222222222 here"),
        ({key: "2" * 40}, "user/a at 1111111111 there, at 2222222222 here"),
        ({key: "2" * 64}, "user/a at 1111111111 there, at 2222222222 here"),
    ]:
        assert manifest.differences(replace(manifest, **changes)) == [f"{key}: {words}"]
    files, changed = (replace(manifest, **{id_key: "here/chats", key: digit * 64}) for digit in "12")
    assert files.differences(changed) == [
        f"{key}: the files of here/chats have changed, 1111111111 there, 2222222222 here"
    ]
    assert manifest.differences(replace(manifest, **{id_key: "user/moved"})) == []


def test_another_run_is_refused_with_what_to_do():
    error = another_run("--output_repo user/x", ["seed: 1 there, 0 here", "top_k: 3 there, 4 here"], "repository")
    assert isinstance(error, UsageError) and str(error) == (
        "--output_repo user/x: holds another run (seed: 1 there, 0 here; top_k: 3 there, 4 here). "
        "Choose another repository, or replace that run with `overwrite`."
    )


# --- shards.json ---


def test_a_listing_that_is_read_is_written_with_the_same_bytes(quick_run):
    path = quick_run / "shards.json"
    assert shards_text(read_shard_list(path, "here").entries) == path.read_text(encoding="utf-8")


def test_other_writers_may_list_path_and_rows_alone(tmp_path):
    (tmp_path / "shards.json").write_text(
        '{"shards": [{"path": "data/00001/a.b-01234.parquet", "num_rows": 5, "ours": {}}]}'
    )
    (entry,) = read_shard_list(tmp_path / "shards.json", "here").entries
    assert entry == ShardEntry("data/00001/a.b-01234.parquet", 5) and entry.shard == 1234


def test_a_changed_listing_is_refused(quick_run, tmp_path):
    listing = json.loads((quick_run / "shards.json").read_text())
    listing["shards"][3]["num_tokens"] += 1
    (tmp_path / "shards.json").write_text(json.dumps(listing))
    with pytest.raises(ToolkitError, match=rf"here: shards.json is damaged \(checksum {listing['crc32']}, expected"):
        read_shard_list(tmp_path / "shards.json", "here")


def as_json_has_it(text: str):
    """As a reader in another language takes it: NaN and Infinity are no JSON."""

    def refuse(number: str):
        raise ValueError(number)

    return json.loads(text, parse_constant=refuse)


def test_a_token_without_any_probability_leaves_the_listing_json(quick_run, tmp_path):
    """FORMAT.md has token_log_probs of -inf, and JSON no number for their sum: ``nll`` may be left out."""
    manifest, stored = Manifest.read(quick_run / "extraction.json", "here"), open_dataset(str(quick_run))
    rows = list(stored.shard_rows(0))
    whole = write_shard(tmp_path, manifest, 0, rows, [])
    assert whole.nll == pytest.approx(-sum(math.fsum(row["token_log_probs"]) for row in rows))
    rows[1]["token_log_probs"][0], rows[1]["mean_nll"], rows[1]["max_surprisal"] = -math.inf, math.inf, math.inf
    entry = write_shard(tmp_path, manifest, 0, rows, [{"row": 0, "reason": "no answer"}])
    assert check_shard(tmp_path, entry.path, manifest.fingerprint, manifest.rows_per_shard) == entry
    (tmp_path / "shards.json").write_text(shards_text([entry]))
    (listed,) = as_json_has_it((tmp_path / "shards.json").read_text())["shards"]
    assert "nll" not in listed and listed["num_tokens"] == sum(row["num_tokens"] for row in rows)
    assert read_shard_list(tmp_path / "shards.json", "here").entries == [entry]
    other = replace(whole, path="data/00000/train-00001.parquet")
    assert mean_nll([whole, other]) == pytest.approx(whole.nll / whole.num_tokens)
    assert mean_nll([entry, other]) is None and mean_nll([]) is None
    card = render_card(manifest, [entry, other])
    assert "bytes per token on disk." in card and "log-likelihood is" not in card
    assert f"log-likelihood is {whole.nll / whole.num_tokens:.4f} nats." in render_card(manifest, [whole, other])


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_a_number_that_json_has_not_is_neither_read_nor_written(tmp_path, number):
    (tmp_path / "shards.json").write_text(f'{{"shards": [{{"path": "data/00000/a-00000.parquet", "nll": {number}}}]}}')
    with pytest.raises(ToolkitError, match=f"here: shards.json is not JSON: {number} is not a finite number"):
        read_shard_list(tmp_path / "shards.json", "here")
    for written in (canonical, json_text):
        with pytest.raises(ValueError, match="not JSON compliant"):
            written({"nll": float(number)})


QUANTIZATION = {"weights": "as stored", "config": {"quant_method": "awq", "bits": 4, "modules_to_not_convert": None}}


@pytest.mark.parametrize(
    ("key", "value"), [("base_revision", "a" * 40), ("keep_end_of_turn", True), ("quantization", QUANTIZATION)]
)
def test_keys_that_decide_the_rows_where_they_are_there(content, key, value):
    """Added to the canonical JSON that FORMAT.md has; a run without one keeps its fingerprint and its file."""
    plain, other = of(content), of({**content, key: value})
    assert key not in plain.as_json() and of(plain.as_json()).fingerprint == plain.fingerprint
    deciding = {key: content[key] for key in FINGERPRINT_KEYS} | {key: value}
    text = json.dumps(deciding, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert other.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    (difference,) = other.differences(plain)
    assert difference.startswith(f"{key}: ")


def test_a_file_that_is_too_large_or_none_is_told(tmp_path):
    """Before any of it is read: 3 GB that take no place on the disk, and a folder."""
    large = tmp_path / "shards.json"
    with large.open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ToolkitError, match=r"list has 3,221,225,472 bytes, expected 536,870,912 at most"):
        read_json(large, "list")
    with pytest.raises(ToolkitError, match="list cannot be read: Is a directory"):
        read_json(tmp_path, "list")
