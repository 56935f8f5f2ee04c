"""The summary against plain loops over every stored position, the extraction's own figures, and worked numbers."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CONVERSATIONS, MODEL, REPO, TEMPLATE
from loopback_hub import LoopbackHub
from plain_decoder import decode_position
from runs import rows_in, shards_in

import extract_logits
from chat_logits.analysis.summary import summarize
from chat_logits.data.row_alignment import AlignmentError
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.display.results import shown
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import METADATA_KEY, SCHEMA, write_shard

TOP_K, NUM_SAMPLED = 64, 16


@pytest.fixture(scope="session")
def faq_extraction(small_model, tmp_path_factory):
    """160 conversations in ten row groups, as a random model sees them, and what the command printed."""
    folder, printed = tmp_path_factory.mktemp("faq") / "out", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    pairs = {"model_id": small_model, "dataset_id": CONVERSATIONS, "output_dir": folder, "chat_template": TEMPLATE}
    with redirect_stdout(printed):
        flags = [str(part) for name, value in pairs.items() for part in (f"--{name}", value)]
        status = extract_logits.main([*flags, "--max_samples", "160"])
    assert status == 0
    printed.seek(0)
    return folder, printed.read()


def naive_position(row, index, token_id) -> SimpleNamespace:
    """What FORMAT.md lets a reader know of one position."""
    decoded = decode_position(row, index, TOP_K, NUM_SAMPLED)
    entropy, rank = 0.0, None
    for place, (stored_id, p) in enumerate(decoded["nucleus"], start=1):
        entropy -= p * math.log(p)
        rank = place if stored_id == token_id else rank
    for p, weight in decoded["sampled"].values():
        entropy -= weight * math.log(p)
    (top_id, top_p), kept = decoded["nucleus"][0], len(decoded["nucleus"])
    loss = -row["token_log_probs"][index]
    found = {"token_id": token_id, "loss": loss, "rank": rank, "kept": kept, "tail_mass": decoded["tail_mass"]}
    return SimpleNamespace(**found, entropy=entropy, top_id=top_id, top_p=top_p)


def naive_reading(folder, tokenizer, source_rows) -> SimpleNamespace:
    """Every position of every row, with target tokens by transformers' own template and a search for the answer."""
    rows, positions = [row for path in shards_in(folder) for row in pq.read_table(path).to_pylist()], []
    for number, row in enumerate(rows):
        question, answer = (turn["value"] for turn in source_rows[row["source_index"]]["conversations"])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        start = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_start|>")) + 3
        assert tokenizer.decode(ids[start - 3 : start]) == "assistant\n" and len(ids) - 2 - start == row["num_tokens"]
        for index, place in enumerate(range(start, len(ids) - 2)):
            found = naive_position(row, index, ids[place])
            found.row, found.place, found.before = number, place, ids[max(0, place - 12) : place]
            positions.append(found)
    return SimpleNamespace(folder=folder, rows=rows, positions=positions, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["SmolLM2", "random model"])
def both(request, smollm2, source_rows):
    """The summary of a dataset, the naive reading of it, and what the extraction printed."""
    if request.param == "SmolLM2":
        folder = request.getfixturevalue("real_extraction")
        printed = (folder.parent.parent / "summary.txt").read_text(encoding="utf-8")
    else:
        folder, printed = request.getfixturevalue("faq_extraction")
    summary = summarize(open_dataset(str(folder)), smollm2[1])
    return summary, naive_reading(folder, smollm2[1], source_rows), printed


# --- against the extraction and plain loops ---


def test_totals_are_the_extractions_own(both):
    summary, naive, printed = both
    shards = json.loads((naive.folder / "shards.json").read_text())["shards"]
    nll = sum(shard["nll"] for shard in shards) / sum(shard["num_tokens"] for shard in shards)
    assert summary.mean_nll == pytest.approx(nll, rel=1e-12)
    assert summary.perplexity == pytest.approx(math.exp(nll), rel=1e-12)
    assert f"mean NLL {summary.mean_nll:.4f} nats, perplexity {summary.perplexity:.2f}\n" in printed
    assert f"{summary.num_conversations:,} written, 0 skipped\n" in printed
    assert f"{summary.num_tokens:,} extracted\n" in printed
    assert f"{summary.bytes_per_token:.1f} bytes a token, {summary.num_bytes:,} bytes in" in printed
    extraction = json.loads((naive.folder / "extraction.json").read_text())
    assert (summary.dataset_id, summary.model_id) == (str(naive.folder), extraction["model_id"])
    print(f"{summary.num_tokens:,} tokens, perplexity {summary.perplexity}")


def test_rates_and_means(both):
    summary, naive, _ = both
    counts = {"first": 0, "five": 0, "any": 0}
    loss = entropy = stored = 0.0
    for position in naive.positions:
        counts["first"] += position.rank == 1
        counts["five"] += position.rank is not None and position.rank <= 5
        counts["any"] += position.rank is not None
        loss, entropy, stored = loss + position.loss, entropy + position.entropy, stored + 1 - position.tail_mass
    number = len(naive.positions)
    assert summary.num_tokens == number and summary.num_conversations == len(naive.rows)
    assert summary.top1_rate == counts["first"] / number
    assert summary.top5_rate == counts["five"] / number
    assert summary.top5_is_bound == any(one.rank is None and one.kept < 5 for one in naive.positions)
    assert not summary.entropy_is_bound
    assert summary.in_nucleus_rate == counts["any"] / number
    assert summary.mean_nll == pytest.approx(loss / number, rel=1e-9)
    assert summary.mean_entropy == pytest.approx(entropy / number, rel=1e-9)
    assert summary.stored == pytest.approx(stored / number, rel=1e-9)


def test_calibration(both):
    summary, naive, _ = both
    error, used = 0.0, 0
    for tenth, found in enumerate(summary.calibration):
        low, high = tenth / 10, (tenth + 1) / 10
        inside = [one for one in naive.positions if low <= one.top_p < high or one.top_p == high == 1]
        assert (found.low, found.high, found.count) == (low, high, len(inside))
        if not inside:
            assert found.confidence is found.accuracy is None
            continue
        confidence = sum(one.top_p for one in inside) / len(inside)
        accuracy = sum(one.top_id == one.token_id for one in inside) / len(inside)
        assert found.confidence == pytest.approx(confidence, rel=1e-9)
        assert found.accuracy == pytest.approx(accuracy, rel=1e-9)
        error += len(inside) / len(naive.positions) * abs(accuracy - confidence)
        used += 1
    assert len(summary.calibration) == 10 and sum(one.count for one in summary.calibration) == len(naive.positions)
    assert summary.calibration_error == pytest.approx(error, rel=1e-9)
    print(f"expected calibration error {error}, {used} bins in use")


@pytest.mark.parametrize(("name", "of"), [("entropies", "entropy"), ("surprisals", "loss")])
def test_histograms_of_nats(both, name, of):
    summary, naive, _ = both
    found, values = getattr(summary, name), [getattr(position, of) for position in naive.positions]
    assert found.is_open_ended and found.edges == [i / 2 for i in range(21)]
    for low, high, count in zip(found.edges, [*found.edges[1:], math.inf], found.counts, strict=True):
        assert sum(low <= value < high for value in values) == count
    assert sum(found.counts) == len(values)


def test_entries_kept(both):
    summary, naive, _ = both
    assert not summary.kept.is_open_ended and summary.kept.edges == list(range(TOP_K + 2))
    assert summary.kept.counts == [sum(one.kept == k for one in naive.positions) for k in range(TOP_K + 1)]


def test_extreme_conversations(both):
    summary, naive, _ = both
    expected = []
    for number, row in enumerate(naive.rows):
        perplexity = math.exp(-math.fsum(row["token_log_probs"]) / row["num_tokens"])
        expected.append(
            (perplexity, number, row["source_index"], row["num_tokens"], row["messages"][0]["content"][:80])
        )
    expected.sort()
    for found, wanted in ((summary.most_confident, expected[:5]), (summary.least_confident, expected[:-6:-1])):
        listed = [(one.sample_index, one.source_index, one.num_tokens, one.question) for one in found]
        assert listed == [one[1:] for one in wanted]
        assert [one.perplexity for one in found] == pytest.approx([one[0] for one in wanted], rel=1e-12)


def as_decoded(text: str) -> str:
    """With lone bytes as a tokenizer's decoding has them."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def test_largest_losses(both):
    summary, naive, _ = both
    expected = sorted(naive.positions, key=lambda one: (-one.loss, one.row, one.place))[:20]
    for found, wanted in zip(summary.largest_losses, expected, strict=True):
        assert (found.sample_index, found.position, found.log_prob) == (wanted.row, wanted.place, -wanted.loss)
        assert as_decoded(found.text) == naive.tokenizer.decode([wanted.token_id])
        assert as_decoded(found.before) == naive.tokenizer.decode(wanted.before)
        assert found.prediction.token_id == wanted.top_id
        assert as_decoded(found.prediction.text) == naive.tokenizer.decode([wanted.top_id])
        assert found.prediction.probability == pytest.approx(wanted.top_p, rel=1e-12)


def test_vocabulary_losses(both):
    summary, naive, _ = both
    losses = {}
    for position in naive.positions:
        losses.setdefault(position.token_id, []).append(position.loss)
    everything = math.fsum(position.loss for position in naive.positions)
    expected = sorted(losses.items(), key=lambda entry: -math.fsum(entry[1]))[:20]
    for found, (token_id, own) in zip(summary.vocabulary_losses, expected, strict=True):
        assert (found.token_id, found.count) == (token_id, len(own))
        assert as_decoded(found.text) == naive.tokenizer.decode([token_id])
        total = math.fsum(own)
        wanted = [total, total / everything, total / len(own)]
        assert [found.total_loss, found.share, found.mean_loss] == pytest.approx(wanted, rel=1e-12)


def test_bytes_by_column(both):
    """By where each column chunk begins in the file: it ends where the next one does, the last one at the footer."""
    summary, naive, _ = both
    expected, everything = dict.fromkeys([*SCHEMA.names, "footer"], 0), 0
    for path in shards_in(naive.folder):
        data, metadata = path.read_bytes(), pq.ParquetFile(path).metadata
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        begins = [(chunk.data_page_offset, chunk.path_in_schema.split(".")[0]) for chunk in chunks]
        for (begin, name), (end, _) in zip(begins, [*begins[1:], (footer, "")], strict=True):
            assert 4 <= begin < end
            expected[name] += end - begin
        expected["footer"] += 4 + len(data) - footer
        everything += len(data)
    assert {one.column: one.num_bytes for one in summary.columns} == expected
    assert [one.column for one in summary.columns] == list(expected) and summary.num_bytes == everything
    for one in summary.columns:
        assert one.bytes_per_token == one.num_bytes / len(naive.positions)
    assert summary.bytes_per_token == everything / len(naive.positions)


def test_json_has_every_number(both):
    summary, _, _ = both
    found = json.loads(shown(summary).to_json())
    assert found["logit_dataset_id"] == summary.dataset_id and found["perplexity"] == summary.perplexity
    assert found["kept"]["counts"] == summary.kept.counts and found["entropies"]["is_open_ended"]
    assert found["entropy_is_bound"] is False and found["top5_is_bound"] is summary.top5_is_bound
    assert [one["question"] for one in found["most_confident"]] == [one.question for one in summary.most_confident]
    assert found["largest_losses"][0]["prediction"]["probability"] == summary.largest_losses[0].prediction.probability


def test_a_template_that_gives_the_same_tokens_changes_nothing(real_extraction, smollm2):
    dataset = open_dataset(str(real_extraction))
    given = summarize(dataset, smollm2[1], chat_template=str(TEMPLATE))
    assert given == summarize(dataset, smollm2[1])
    other = TEMPLATE.read_text(encoding="utf-8").replace("helpful AI", "unhelpful AI")
    with pytest.raises(AlignmentError, match="row 0: this chat template does not fit the extraction"):
        summarize(dataset, smollm2[1], chat_template=other)


# --- what is a lower bound ---


def test_without_draws_entropies_are_lower_bounds(flags, quick_run, quick_model, tmp_path):
    """Of the same tokens: the nuclei's part of what a dataset with draws says."""
    assert extract_logits.main(flags("out", "--num_sampled", 0)) == 0
    tokenizer = load_tokenizer(str(quick_model))
    found = summarize(open_dataset(str(tmp_path / "out")), tokenizer)
    assert found.entropy_is_bound and json.loads(shown(found).to_json())["entropy_is_bound"] is True
    expected = []
    for row in rows_in(tmp_path / "out"):
        for i in range(row["num_tokens"]):
            nucleus = decode_position(row, i, TOP_K, 0)["nucleus"]
            expected.append(-math.fsum(p * math.log(p) for _, p in nucleus))
    assert found.mean_entropy == pytest.approx(math.fsum(expected) / len(expected), rel=1e-9)
    whole = summarize(open_dataset(str(quick_run)), tokenizer)
    print(f"mean entropy at least {found.mean_entropy}, with draws {whole.mean_entropy}")
    assert found.mean_entropy < whole.mean_entropy and found.mean_nll == pytest.approx(whole.mean_nll, rel=1e-5)
    buffer = io.StringIO()
    with redirect_stdout(buffer):
        shown(found).print()
    assert f"mean entropy ≥ {found.mean_entropy:.2f} nats" in buffer.getvalue() and "| Entropy ≥ " in buffer.getvalue()


@pytest.mark.parametrize(("kept", "is_bound"), [(64, False), (5, False), (4, True), (1, True)])
def test_top5_is_a_bound_where_a_nucleus_ends_before_the_fifth(copy, smollm2, kept, is_bound):
    """Whole nuclei first; then that of one position, whose target token is in none, is cut to so many entries."""
    row = pq.read_table(shards_in(copy)[0]).to_pylist()[0]
    n, place = row["num_tokens"], 7
    ids = [1000 + rank for _ in range(n) for rank in range(TOP_K)]  # far from all tokens of the answer
    codes = np.tile(np.arange(TOP_K, 0, -1, dtype=np.uint8), (n, 1))
    codes[place, kept:] = 0
    ids[place * TOP_K + kept : (place + 1) * TOP_K] = [0] * (TOP_K - kept)
    changed = {"top_logits_quantized": codes.tobytes(), "top_indices_low": ids}
    write_again(copy, [{**row, **changed, "top_indices_high": bytes(n * TOP_K // 4)}])
    found = summarize(open_dataset(str(copy)), smollm2[1])
    assert found.top5_rate == 0 and found.top5_is_bound is is_bound


def test_with_fewer_than_five_entries_top5_is_a_bound(small_model, chat_file, smollm2, tmp_path):
    source = chat_file([{"question": "What is new?", "answer": "The wall is red and warm."}])
    pairs = {"model_id": small_model, "dataset_id": source, "output_dir": tmp_path / "out", "top_k": 4, "top_p": 1}
    flags = [str(part) for name, value in pairs.items() for part in (f"--{name}", value)]
    assert extract_logits.main([*flags, "--chat_template", str(TEMPLATE)]) == 0
    found = summarize(open_dataset(str(tmp_path / "out")), smollm2[1])
    assert found.in_nucleus_rate < 1 and found.top5_is_bound and found.top5_rate == found.in_nucleus_rate


# --- memory ---


def write_copies(folder, to, times: int):
    """A dataset whose shards are those of ``folder``, over and over, of other source rows."""
    dataset = open_dataset(str(folder))
    size, shards = dataset.manifest.rows_per_shard, list(dataset.row_groups(dataset.shards))
    numbers = [shard.shard for shard in dataset.shards]
    to.mkdir()
    shutil.copyfile(folder / "extraction.json", to / "extraction.json")
    entries = []
    for number in range(times * len(numbers)):
        shift = number - numbers[number % len(numbers)]
        rows = [row for _, group in shards for row in group if row["source_index"] // size == number - shift]
        moved = [{**row, "source_index": row["source_index"] + shift * size} for row in rows]
        entries.append(write_shard(to, dataset.manifest, number, moved, []).as_json())
    (to / "shards.json").write_text(json.dumps({"shards": entries}))
    return to


def test_memory_does_not_grow_with_the_rows(faq_extraction, real_extraction, smollm2, tmp_path):
    folder, peaks, summaries = faq_extraction[0], [], []
    summarize(open_dataset(str(real_extraction)), smollm2[1])  # what is imported and compiled once is not counted
    for dataset in (folder, write_copies(folder, tmp_path / "long", 4)):
        tracemalloc.start()
        summaries.append(summarize(open_dataset(str(dataset)), smollm2[1]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    print(f"at most {peaks[0] / 2**20:.2f} and {peaks[1] / 2**20:.2f} MiB")
    assert peaks[1] < peaks[0] + 2**18
    assert [one.num_conversations for one in summaries] == [160, 640]
    assert summaries[1].num_tokens == 4 * summaries[0].num_tokens
    assert summaries[1].perplexity == pytest.approx(summaries[0].perplexity, rel=1e-12)


def test_one_row_group_at_a_time_is_in_memory(faq_extraction):
    """Arrow's own memory, which tracemalloc does not see."""
    largest = max(
        pq.ParquetFile(path).read_row_group(i).nbytes
        for path in shards_in(faq_extraction[0])
        for i in range(pq.ParquetFile(path).metadata.num_row_groups)
    )
    before = pa.total_allocated_bytes()
    held = max(pa.total_allocated_bytes() for _ in open_dataset(str(faq_extraction[0])).rows()) - before
    print(f"{held / largest:.2f} times the largest row group")
    assert held < 4 * largest


# --- all rows ---


def test_all_rows_come_in_order(quick_run):
    """60 shards, from some of which rows are missing."""
    expected = [row for path in shards_in(quick_run) for row in pq.read_table(path).to_pylist()]
    dataset = open_dataset(str(quick_run))
    assert len(expected) == dataset.num_rows < 180
    assert list(dataset.rows()) == expected


@pytest.fixture
def copy(real_extraction, tmp_path):
    return shutil.copytree(real_extraction, tmp_path / "copy")


def write_again(folder, rows: list[dict]):
    """The dataset's one shard with other rows, whose checksums are true."""
    entry = write_shard(folder, Manifest.read(folder / "extraction.json", "copy"), 0, rows, [])
    (folder / "shards.json").write_text(json.dumps({"shards": [entry.as_json()]}))


def test_a_folder_has_no_revisions(real_extraction):
    with pytest.raises(UsageError, match=r"`revision` main: .*outputs/demo is a local folder, which has no revisions$"):
        open_dataset(str(real_extraction), "main")


@pytest.mark.parametrize("size", [1, 8, 17, 64])
def test_row_groups_of_any_size_are_read(copy, size):
    (path,) = shards_in(copy)
    table, metadata = pq.read_table(path), pq.ParquetFile(path).metadata.metadata
    with pq.ParquetWriter(path, SCHEMA, store_schema=False) as writer:
        writer.add_key_value_metadata({METADATA_KEY: metadata[METADATA_KEY.encode()].decode()})
        writer.write_table(table, row_group_size=size)
    assert list(open_dataset(str(copy)).rows()) == table.to_pylist()


def test_the_hub_gives_the_same_summary(real_extraction, smollm2, tmp_path):
    code = """
from chat_logits.data.tokenizer import load_tokenizer
from chat_logits.analysis.summary import summarize
from chat_logits.display.results import shown
from chat_logits.storage.dataset import open_dataset
import sys; print(shown(summarize(open_dataset("user/logits"), load_tokenizer(sys.argv[1]))).to_json())
"""
    paths = [path for path in real_extraction.rglob("*") if path.is_file() and not path.name.startswith(".")]
    files = {path.relative_to(real_extraction).as_posix(): path.read_bytes() for path in paths}
    with LoopbackHub() as hub:
        hub.add_repo("dataset", "user/logits", files=files)
        done = subprocess.run(
            [sys.executable, "-c", code, MODEL],
            env=hub.environment(tmp_path),
            capture_output=True,
            text=True,
            cwd=REPO,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        sent = sum(request.sent for request in hub.requests)
    found = json.loads(done.stdout)
    expected = json.loads(shown(summarize(open_dataset(str(real_extraction)), smollm2[1])).to_json())
    assert found.pop("logit_dataset_id") == "user/logits" and expected.pop("logit_dataset_id")
    revision, written = found["run"].pop("revision"), expected["run"].pop("written")
    assert re.fullmatch("[0-9a-f]{40}", revision) and written  # a commit there, a time here
    assert (found["run"].pop("written"), expected["run"].pop("revision")) == (None, None)
    assert found == expected
    total = sum(map(len, files.values()))
    print(f"{sent:,} bytes were sent of a repository of {total:,}")
    assert sent < total + 2 * 2**16  # Arrow asks for 64 KiB at the end of a file; for the rows, and for the sizes


# --- what must not break it, and what must ---


def test_impossible_tokens(copy, smollm2):
    rows = pq.read_table(shards_in(copy)[0]).to_pylist()
    rows[3]["token_log_probs"][5] = rows[7]["token_log_probs"][2] = -math.inf
    write_again(copy, rows)
    summary = summarize(open_dataset(str(copy)), smollm2[1])
    assert summary.mean_nll == summary.perplexity == math.inf
    assert [one.sample_index for one in summary.least_confident[:2]] == [3, 7]
    assert [(one.sample_index, one.log_prob) for one in summary.largest_losses[:2]] == [(3, -math.inf), (7, -math.inf)]
    assert summary.surprisals.counts[-1] >= 2 and sum(summary.surprisals.counts) == summary.num_tokens
    found = json.loads(shown(summary).to_json(), parse_constant=pytest.fail)
    assert found["perplexity"] is None and found["vocabulary_losses"][0]["share"] is None
    buffer = io.StringIO()
    with redirect_stdout(buffer):
        shown(summary).print()
    assert "mean NLL inf nats, perplexity inf" in buffer.getvalue()


def test_certain_tokens_and_an_empty_nucleus(copy, smollm2):
    """A last bit above 0 is what a float32 log-sum-exp can leave of a certain token."""
    row = pq.read_table(shards_in(copy)[0]).to_pylist()[0]
    n = row["num_tokens"]
    nothing = {"top_logits_quantized": bytes(n * TOP_K), "top_indices_low": [0] * (n * TOP_K)}
    nothing["top_indices_high"] = bytes(n * TOP_K // 4)
    write_again(copy, [{**row, **nothing, "token_log_probs": [1e-6, *[0.0] * (n - 1)]}])
    summary = summarize(open_dataset(str(copy)), smollm2[1])
    assert summary.perplexity == pytest.approx(1) and summary.stored == summary.top1_rate == 0
    assert summary.kept.counts[0] == summary.surprisals.counts[0] == summary.calibration[0].count == n
    assert summary.most_confident == summary.least_confident and len(summary.most_confident) == 1
    assert all(one.prediction is None for one in summary.largest_losses)
    shown(summary).print()


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ('{"shards": [], "unfinished": true}', "it has no rows yet; its extraction is not finished"),
        ('{"shards": []}', "it has no rows; nothing was extracted from its source"),
    ],
)
def test_a_dataset_without_rows_is_refused(copy, smollm2, listing, message):
    (copy / "shards.json").write_text(listing)
    with pytest.raises(ToolkitError, match=message):
        summarize(open_dataset(str(copy)), smollm2[1])


def test_a_damaged_row_is_named(copy, smollm2):
    (path,) = shards_in(copy)
    whole = path.read_bytes()
    rows = pq.read_table(path).to_pylist()

    rows[19]["num_tokens"] -= 1
    write_again(copy, rows)
    with pytest.raises(ToolkitError, match=r"column top_logits_quantized of row 19: found length \d+, expected length"):
        summarize(open_dataset(str(copy)), smollm2[1])

    rows[19]["num_tokens"] += 1
    rows[21]["messages"][1]["content"] += " It is not."
    write_again(copy, rows)
    with pytest.raises(AlignmentError, match=r"row 21: column alignment_checksum: the rebuilt conversation"):
        summarize(open_dataset(str(copy)), smollm2[1])

    damaged = bytearray(whole)
    damaged[len(damaged) // 3] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ToolkitError, match=r"train-00000\.parquet: damaged Parquet file"):
        summarize(open_dataset(str(copy)), smollm2[1])
    path.write_bytes(whole[:1000])
    with pytest.raises(ToolkitError, match=r"train-00000\.parquet: damaged Parquet file"):
        open_dataset(str(copy)).sizes()


def test_rows_that_were_changed_behind_their_checksums_are_refused(copy):
    (path,) = shards_in(copy)
    metadata, rows = pq.ParquetFile(path).metadata.metadata, pq.read_table(path).to_pylist()
    rows[30]["token_log_probs"][0] -= 1
    with pq.ParquetWriter(path, SCHEMA, store_schema=False) as writer:
        writer.add_key_value_metadata({METADATA_KEY: metadata[METADATA_KEY.encode()].decode()})
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=16)
    read = 0
    with pytest.raises(ToolkitError, match="row 30 is not what was written"):
        for _ in open_dataset(str(copy)).rows():
            read += 1
    assert read == 30
