"""Reading refuses what the format forbids; writing leaves whole files or none."""

import json
import shutil
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage import dataset as dataset_module
from chat_logits.storage.columns import ColumnReader
from chat_logits.storage.dataset import StoredDataset, open_dataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import METADATA_KEY, SCHEMA, write_shard


@pytest.fixture
def copy(real_extraction, tmp_path):
    """A copy of the real dataset that a test may damage."""
    return shutil.copytree(real_extraction, tmp_path / "copy")


def shard_of(folder):
    (path,) = folder.glob("data/*/*.parquet")
    return path


def rewrite(folder, schema=SCHEMA, **changes):
    """Change columns of row 3 and write the shard again, as another writer might, who gives no checksums of rows."""
    rows = pq.read_table(shard_of(folder)).to_pylist()
    rows[3].update(changes)
    write_plainly(pa.Table.from_pylist(rows, schema=schema), folder, row_group_size=16)


def write_plainly(table, folder, **options):
    """Write the shard with the metadata that the format asks for and no more."""
    described = json.loads(pq.ParquetFile(shard_of(folder)).metadata.metadata[METADATA_KEY.encode()])
    described = {key: value for key, value in described.items() if key not in ("row_crc32", "crc32")}
    described["num_rows"] = len(table)
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    described["crc32"] = zlib.crc32(text.encode())
    with pq.ParquetWriter(shard_of(folder), table.schema, store_schema=False) as writer:
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(described)})
        writer.write_table(table, **options)


def test_rows_are_counted_from_both_ends(real_extraction):
    dataset = open_dataset(str(real_extraction))
    assert dataset.num_rows == 32
    assert dataset.read_row(-1) == dataset.read_row(31)
    assert [dataset.read_row(i)["source_index"] for i in (0, 15, 16, 31)] == [0, 15, 16, 31]


@pytest.mark.parametrize("index", [32, -33])
def test_rows_outside_are_refused(real_extraction, index):
    with pytest.raises(UsageError, match=f"sample_index {index}: .* has 32 rows, 0 to 31"):
        open_dataset(str(real_extraction)).read_row(index)


@pytest.mark.parametrize(("name", "what"), [("extraction.json", "not a logit dataset"), ("shards.json", "incomplete")])
def test_a_folder_without_the_files_around_is_refused(copy, name, what):
    (copy / name).unlink()
    with pytest.raises(ToolkitError, match=f"no {name} in it, so it is {what}"):
        open_dataset(str(copy))


def test_a_shard_that_is_missing_or_of_another_length_is_named(copy):
    table = pq.read_table(shard_of(copy))
    write_plainly(table.slice(0, 30), copy)
    with pytest.raises(ToolkitError, match=r"train-00000\.parquet: 30 rows, expected 32"):
        open_dataset(str(copy)).read_row(0)
    shard_of(copy).unlink()
    with pytest.raises(ToolkitError, match=r"no data/00000/train-00000\.parquet in it, so it is incomplete"):
        open_dataset(str(copy)).read_row(0)


@pytest.mark.parametrize("size", [1, 8, 17, 64])
def test_row_groups_of_any_size_are_read(copy, real_extraction, size):
    table = pq.read_table(shard_of(copy))
    write_plainly(table, copy, row_group_size=size)
    dataset, expected = open_dataset(str(copy)), open_dataset(str(real_extraction))
    for index in (0, 7, 8, 16, 17, 31):
        assert dataset.read_row(index) == expected.read_row(index)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("extraction.json", [], "does not hold a JSON object"),
        ("extraction.json", {}, "format_version None, expected 2"),
        ("extraction.json", {"top_k": "64"}, "top_k '64', expected"),
        ("extraction.json", {"skipped_token_ids": None}, "skipped_token_ids None, expected"),
        ("shards.json", {}, "lists no shards"),
        ("shards.json", {"shards": [{"path": "../x", "num_rows": 32}]}, "lists no shards"),
        ("shards.json", {"shards": [{"path": "data/x", "num_rows": "32"}]}, "lists no shards"),
        (
            "shards.json",
            {"shards": [{"path": "data/00000/train-00007.parquet", "num_rows": 10**12}]},
            "shards.json lists 1,000,000,000,000 rows in data/00000/train-00007.parquet, expected 256 at most",
        ),
        ("shards.json", {"shards": []}, "it has no rows; nothing was extracted from its source"),
        ("shards.json", {"shards": [], "unfinished": True}, "it has no rows yet; its extraction is not finished"),
    ],
)
def test_damaged_files_around_are_named(copy, name, content, message):
    if name == "extraction.json" and content:
        content = {**json.loads((copy / name).read_text()), **content}
    (copy / name).write_text(json.dumps(content))
    with pytest.raises(ToolkitError, match=message):
        open_dataset(str(copy)).read_row(0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./outputs/dmeo", r"no such folder; the nearest one is outputs/demo$"),
        ("a/b/c", "no such folder$"),
        ("outptus/demo", r"\nThere is no such folder either; the nearest one is outputs/demo$"),
        (
            "outputs/demo/extraction.json",
            "a file, expected the folder that extraction.json is in, such as outputs/demo$",
        ),
    ],
)
def test_a_folder_that_is_not_there_is_told_with_the_nearest_that_is(
    real_extraction, tmp_path, monkeypatch, name, told
):
    shutil.copytree(real_extraction, tmp_path / "outputs" / "demo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolkitError, match=rf"{name}: .*{told}"):
        open_dataset(name)


def test_damaged_json_is_named(copy):
    (copy / "extraction.json").write_text("{")
    with pytest.raises(ToolkitError, match=r"extraction\.json is not JSON"):
        open_dataset(str(copy))


def test_another_version_is_refused(copy):
    extraction = json.loads((copy / "extraction.json").read_text())
    (copy / "extraction.json").write_text(json.dumps({**extraction, "format_version": 1}))
    with pytest.raises(ToolkitError, match="format_version 1, expected 2"):
        open_dataset(str(copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_logits_quantized": b"\x01"}, r"column top_logits_quantized of row 3: found length 1, expected"),
        ({"num_tokens": 1}, r"column top_logits_quantized of row 3: found length \d+, expected length 64"),
        ({"num_tokens": 0}, "column num_tokens of row 3: found 0"),
        ({"logsumexp": []}, "column logsumexp of row 3"),
        ({"logsumexp": None}, "column logsumexp of row 3: found nothing"),
        ({"top_logits_quantized": None}, "column top_logits_quantized of row 3: found nothing"),
    ],
)
def test_malformed_rows_are_refused_by_name(copy, changes, message):
    rewrite(copy, **changes)
    dataset = open_dataset(str(copy))
    assert dataset.read_row(2)["num_tokens"] > 0
    with pytest.raises(ToolkitError, match=message):
        dataset.read_row(3)
    with pytest.raises(ToolkitError, match=message.replace("nothing", "(nothing|length 0)")):
        list(dataset.row_groups(dataset.shards))


def test_a_row_without_tokens_is_refused_among_others(copy):
    """Its columns have the right lengths, none; checked together with other rows, nothing would be missing."""
    numbers = {key: [] for key in ("top_indices_low", "sampled_indices_low", "logsumexp", "token_log_probs")}
    kinds = ("top_logits_quantized", "top_indices_high", "sampled_logits_quantized", "sampled_indices_high")
    rewrite(copy, num_tokens=0, **numbers, **dict.fromkeys(kinds, b""))
    dataset = open_dataset(str(copy))
    with pytest.raises(ToolkitError, match="column num_tokens of row 3: found 0"):
        list(dataset.row_groups(dataset.shards))


def test_another_schema_is_refused(copy):
    fields = [pa.field("num_tokens", pa.int64()) if field.name == "num_tokens" else field for field in SCHEMA]
    rewrite(copy, schema=pa.schema(fields))
    with pytest.raises(ToolkitError, match="num_tokens is int64, expected int32"):
        open_dataset(str(copy)).read_row(0)


def test_a_flipped_byte_is_found_by_the_page_checksum(copy):
    content = bytearray(shard_of(copy).read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard_of(copy).write_bytes(content)
    dataset = open_dataset(str(copy))
    failures = 0
    for index in (0, 16):
        try:
            dataset.read_row(index)
        except ToolkitError as error:
            assert "damaged Parquet file" in str(error)
            failures += 1
    assert failures == 1


def test_a_cut_file_is_named(copy):
    shard_of(copy).write_bytes(shard_of(copy).read_bytes()[:1000])
    with pytest.raises(ToolkitError, match=r"train-00000\.parquet: damaged Parquet file"):
        open_dataset(str(copy)).read_row(0)


def test_metadata_says_what_the_shard_covers(real_extraction):
    described = json.loads(pq.ParquetFile(shard_of(real_extraction)).metadata.metadata[METADATA_KEY.encode()])
    crc = described.pop("crc32")
    assert len(described["row_crc32"]) == 32
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert crc == zlib.crc32(text.encode())
    del described["row_crc32"]
    assert described == {
        "fingerprint": open_dataset(str(real_extraction)).manifest.fingerprint,
        "first_row": 0,
        "end_row": 32,
        "num_rows": 32,
        "skipped": [],
        "turns_left_out": 0,
        "remarks": [],
    }


def test_extraction_json_has_the_formats_keys(real_extraction):
    extraction = json.loads((real_extraction / "extraction.json").read_text())
    listed = """format_version top_k top_p num_sampled seed vocab_size rows_per_shard model_id model_revision
    tokenizer_fingerprint dataset_id dataset_config split dataset_revision columns chat_template template_kwargs
    template_date mask_source skipped_token_ids dtype attn_implementation versions batch_tokens"""
    assert set(listed.split()) <= set(extraction)
    assert extraction["vocab_size"] == 49_152 and extraction["dtype"] == "float32"


def manifest_of(folder) -> Manifest:
    return Manifest.read(folder / "extraction.json", str(folder))


def test_a_write_that_fails_leaves_no_shard(real_extraction, tmp_path):
    row = pq.read_table(shard_of(real_extraction)).to_pylist()[0]
    with pytest.raises(pa.ArrowException):
        write_shard(tmp_path, manifest_of(real_extraction), 0, [{**row, "num_tokens": "three"}], [])
    assert not list(tmp_path.rglob("*.parquet*"))


def read_in_every_way(folder) -> list[str]:
    """What each way of reading a dataset says of it, "" where nothing."""
    dataset, told = open_dataset(str(folder)), []
    for read in (
        lambda: list(dataset.rows()),
        lambda: [rows for _, rows in dataset.row_groups(dataset.shards)],
        lambda: list(dataset.chosen_rows(range(dataset.num_rows))),
        lambda: [dataset.read_row(number) for number in range(dataset.num_rows)],
        lambda: [ColumnReader(dataset).shard(number, ["num_tokens"]) for number in range(len(dataset.shards))],
    ):
        try:
            read()
            told.append("")
        except ToolkitError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("change", ["swapped", "copied"])
def test_a_shard_in_anothers_place_is_refused(quick_run, tmp_path, change):
    """Of as many rows, so that no count tells."""
    folder = shutil.copytree(quick_run, tmp_path / "run")
    by_size: dict[int, list] = {}
    for shard in open_dataset(str(folder)).shards:
        by_size.setdefault(shard.num_rows, []).append(folder / shard.path)
    first, other = max(by_size.values(), key=len)[:2]
    assert read_in_every_way(folder) == [""] * 5
    content = first.read_bytes()
    if change == "swapped":
        first.write_bytes(other.read_bytes())
    other.write_bytes(content)
    for told in read_in_every_way(folder):
        assert "it has source rows from" in told and ", expected those from " in told


@pytest.mark.parametrize("rows", [[1, 0, *range(2, 32)], [0, 0, *range(2, 32)], [*range(31), 256]])
def test_source_rows_that_do_not_ascend_within_the_shard_are_refused(copy, rows):
    table = pq.read_table(shard_of(copy))
    at = table.schema.get_field_index("source_index")
    write_plainly(table.set_column(at, SCHEMA.field(at), pa.array(rows, SCHEMA.field(at).type)), copy)
    for told in read_in_every_way(copy)[:4]:
        assert "column source_index has" in told and "expected ascending numbers of 0 to 255" in told


def test_a_source_row_that_is_null_is_named(copy):
    rewrite(copy, source_index=None)
    for told in read_in_every_way(copy)[:4]:
        assert "column source_index has a null" in told


def test_an_empty_shard_can_be_read_with_the_others(copy):
    """Every row of a source range may be skipped."""
    import datasets

    write_shard(copy, manifest_of(copy), 1, [], [{"row": row, "reason": "no answer"} for row in range(256, 300)])
    assert len(datasets.load_dataset(str(copy), split="train")) == 32


class Seen(list):
    """A list that counts how many of its entries were taken out."""

    count = 0

    def __iter__(self):
        for entry in super().__iter__():
            self.count += 1
            yield entry

    def __getitem__(self, at):
        found = super().__getitem__(at)
        self.count += len(found) if isinstance(at, slice) else 1
        return found


@pytest.fixture
def many_shards(real_extraction, tmp_path) -> StoredDataset:
    """The real rows in shards of none, one, two, none, … of them."""
    manifest, rows = manifest_of(real_extraction), pq.read_table(shard_of(real_extraction)).to_pylist()
    entries = Seen()
    while rows:
        kept = [rows.pop(0) for _ in range(min(len(rows), len(entries) % 3))]
        first = len(entries) * manifest.rows_per_shard
        kept = [{**row, "source_index": first + i} for i, row in enumerate(kept)]
        entries.append(write_shard(tmp_path, manifest, len(entries), kept, []))
    return StoredDataset(str(tmp_path), None, manifest, entries)


@pytest.mark.parametrize("way", ["rows", "shard_rows", "row_groups", "row_groups of each", "chosen_rows", "read_row"])
def test_no_shard_looks_at_all_others(many_shards, real_extraction, monkeypatch, way):
    """Each row with its number, as in one shard; and the list of shards is gone through a few times, whatever its
    length."""
    numbers, validate = [], dataset_module.validate_row

    def noting(row, *arguments, row_number):
        numbers.append(row_number)
        validate(row, *arguments, row_number=row_number)

    monkeypatch.setattr(dataset_module, "validate_row", noting)
    stored, shards = many_shards, list(many_shards.shards)
    stored.shards.count = 0
    if way == "rows":
        found = list(stored.rows())
    elif way == "shard_rows":
        found = [row for number in range(len(shards)) for row in stored.shard_rows(number)]
    elif way == "chosen_rows":
        found = [row for _, row in stored.chosen_rows(range(32))]
    elif way == "read_row":
        found = [stored.read_row(number) for number in range(32)]
    else:
        asked = [[shard] for shard in shards] if way.endswith("each") else [shards]
        groups = [group for some in asked for group in stored.row_groups(some)]
        found = [row for _, rows in groups for row in rows]
        numbers = [first + i for first, rows in groups for i in range(len(rows))]
    expected = pq.read_table(shard_of(real_extraction)).to_pylist()
    assert [row["alignment_checksum"] for row in found] == [row["alignment_checksum"] for row in expected]
    assert numbers == list(range(32))
    assert len(shards) >= 32 and stored.shards.count <= 4 * len(shards)


def test_row_checksums_are_as_the_format_says(real_extraction):
    """Laid out by hand from FORMAT.md, column by column."""
    described = json.loads(pq.ParquetFile(shard_of(real_extraction)).metadata.metadata[METADATA_KEY.encode()])
    for row, expected in zip(pq.read_table(shard_of(real_extraction)).to_pylist(), described["row_crc32"], strict=True):
        parts = []
        for kind in ("top", "sampled"):
            low = row[f"{kind}_indices_low"]
            packed = struct.pack(f"<{len(low)}H", *low)
            parts += [row[f"{kind}_logits_quantized"], packed, row[f"{kind}_indices_high"]]
        n = row["num_tokens"]
        parts += [struct.pack(f"<{n}f", *row["logsumexp"]), struct.pack("<q", n)]
        numbers = [row[name] for name in ("mean_nll", "mean_entropy", "top1_rate", "max_surprisal")]
        parts.append(struct.pack("<4f", *numbers))
        messages = [[message["role"], message["content"], message["extra"]] for message in row["messages"]]
        parts += [struct.pack(f"<{n}f", *row["token_log_probs"])]
        parts += [json.dumps(messages, separators=(",", ":"), ensure_ascii=False).encode()]
        parts += [struct.pack("<qq", row["source_index"], row["alignment_checksum"]), json.dumps(row["tools"]).encode()]
        assert zlib.crc32(b"".join(parts)) == expected


def test_a_row_that_is_not_what_was_written_is_refused(copy):
    """Page headers and footer are in no page's CRC: the row's own shows what they did."""
    described = json.loads(pq.ParquetFile(shard_of(copy)).metadata.metadata[METADATA_KEY.encode()])
    rows = pq.read_table(shard_of(copy)).to_pylist()
    rows[3]["logsumexp"][0] += 1
    del described["crc32"]
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    described["crc32"] = zlib.crc32(text.encode())
    with pq.ParquetWriter(shard_of(copy), SCHEMA, store_schema=False) as writer:
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(described)})
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    dataset = open_dataset(str(copy))
    assert dataset.read_row(2)["num_tokens"] > 0
    with pytest.raises(ToolkitError, match="row 3 is not what was written"):
        dataset.read_row(3)


def test_a_shard_of_another_run_is_refused(copy):
    extraction = json.loads((copy / "extraction.json").read_text())
    (copy / "extraction.json").write_text(json.dumps({**extraction, "seed": 1}))
    with pytest.raises(ToolkitError, match=r"train-00000\.parquet: of another run \(fingerprint"):
        open_dataset(str(copy)).read_row(0)


def test_a_shard_without_the_formats_metadata_is_refused(copy):
    pq.write_table(pq.read_table(shard_of(copy)), shard_of(copy), store_schema=False)
    with pytest.raises(ToolkitError, match="no metadata 'logit_extraction'"):
        open_dataset(str(copy)).read_row(0)
