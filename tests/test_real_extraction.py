"""The command's output for real conversations of a real model, against plain forwards of each conversation."""

import datasets
import numpy as np
import plain_decoder
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TEMPLATE

import logit_codec
from chat_logits.data.row_alignment import align_row
from chat_logits.storage import dataset as logit_dataset
from chat_logits.storage import shard as shard_files


@pytest.fixture(scope="module")
def stored(real_extraction):
    """The dataset and its 32 rows."""
    dataset = logit_dataset.open_dataset(str(real_extraction))
    return dataset, [dataset.read_row(i) for i in range(dataset.num_rows)]


@pytest.fixture(scope="module")
def plain(smollm2, source_rows):
    """Input ids by transformers' own template and tokenizer, and float64 log-probabilities and logsumexp."""
    model, tokenizer = smollm2
    found = []
    for row in source_rows[:32]:
        question, answer = (turn["value"] for turn in row["conversations"])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double()
        found.append((np.array(ids), torch.log_softmax(logits, -1).numpy(), logits.logsumexp(-1).numpy()))
    return found


@pytest.fixture(scope="module")
def positions(stored, smollm2, plain):
    """Extracted positions by a search of its own: the answer's tokens lie before the last <|im_end|> and newline."""
    dataset, rows = stored
    found = []
    for row, (ids, _, _) in zip(rows, plain, strict=True):
        aligned = align_row(row, smollm2[1], dataset.manifest)
        start = np.flatnonzero(ids == smollm2[1].convert_tokens_to_ids("<|im_start|>"))[-1] + 4
        assert smollm2[1].decode(ids[start - 3 : start]) == "assistant\n"
        assert aligned.positions.tolist() == list(range(start, len(ids) - 2))
        assert aligned.input_ids.tolist() == ids.tolist()
        found.append(aligned.positions)
    return found


def test_every_position_is_the_plain_forwards(stored, plain, positions):
    for row, (ids, log_probs, logsumexp), where in zip(stored[1], plain, positions, strict=True):
        expected = log_probs[where - 1, ids[where]]
        assert np.abs(np.array(row["token_log_probs"]) - expected).max() < 1e-4
        assert np.abs(np.array(row["logsumexp"]) - logsumexp[where - 1]).max() < 1e-4


def test_numbers_of_rows_are_those_of_their_columns_and_of_the_plain_forwards(stored, plain, positions):
    means = []
    for row, (ids, log_probs, _), where in zip(stored[1], plain, positions, strict=True):
        numbers = {name: row[name] for name in logit_codec.ROW_NUMBERS}
        assert numbers == pytest.approx(plain_decoder.numbers_of_row(row, ids[where].tolist(), 64, 16), rel=1e-6)
        truth = log_probs[where - 1]
        surprisals = -truth[np.arange(len(where)), ids[where]]
        assert numbers["mean_nll"] == pytest.approx(surprisals.mean(), abs=1e-4)
        assert numbers["max_surprisal"] == pytest.approx(surprisals.max(), abs=1e-4)
        assert numbers["top1_rate"] == pytest.approx((truth.argmax(axis=1) == ids[where]).mean(), abs=1e-6)
        means.append((numbers["mean_entropy"], -(np.exp(truth) * truth).sum(axis=1).mean()))
    found, true = np.array(means).T
    assert abs(found / true - 1).max() < 0.05  # of a conversation, by its draws
    assert found.mean() == pytest.approx(true.mean(), rel=0.003)


@pytest.mark.parametrize("shift", [-1, 1])
def test_one_position_off_is_worse_by_more_than_a_nat(stored, plain, positions, shift):
    errors = []
    for row, (ids, log_probs, _), where in zip(stored[1], plain, positions, strict=True):
        shifted = log_probs[np.clip(where - 1 + shift, 0, len(ids) - 1), ids[where]]
        errors.append(np.abs(np.array(row["token_log_probs"]) - shifted))
    assert np.concatenate(errors).mean() > 1


def test_nuclei_are_the_plain_forwards_top_ids(stored, plain, positions):
    for row, (_, log_probs, _), where in zip(stored[1], plain, positions, strict=True):
        decoded = logit_codec.decode_row(row)
        for i, position in enumerate(where):
            truth = log_probs[position - 1]
            kept = decoded.top_ids[i][np.isfinite(decoded.top_log_probs[i])]
            expected = logit_codec.select_nucleus(truth, 64, 0.98)
            if kept.tolist() != expected.tolist():  # ties aside: the same values in another order or at the cut
                assert abs(len(kept) - len(expected)) <= 1
                common = min(len(kept), len(expected))
                np.testing.assert_allclose(truth[kept[:common]], truth[expected[:common]], atol=2e-4)


def test_divergence_and_size(stored, plain, positions, real_extraction):
    divergences, tokens = [], 0
    for row, (_, log_probs, _), where in zip(stored[1], plain, positions, strict=True):
        decoded = logit_codec.decode_row(row)
        tokens += len(where)
        for i, position in enumerate(where):
            present = np.isfinite(decoded.top_log_probs[i])
            q = np.exp(decoded.top_log_probs[i][present])
            p = np.exp(log_probs[position - 1][decoded.top_ids[i][present]])
            p, q = np.append(p, max(1 - p.sum(), 1e-300)), np.append(q, max(1 - q.sum(), 1e-9))
            divergences.append((p * np.log(p / (q / q.sum()))).sum())
    shards = list(real_extraction.glob("data/*/*.parquet"))
    assert np.mean(divergences) <= 2.5e-4
    assert sum(shard.stat().st_size for shard in shards) / tokens <= 190


def test_the_naive_decoder_agrees_on_every_position(stored):
    from test_logit_codec import check_position

    row = stored[1][5]
    for index in range(row["num_tokens"]):
        check_position(row, index, 64, 16)


def test_the_checksum_is_the_naive_one(stored, plain, positions):
    for row, (ids, _, _), where in zip(stored[1], plain, positions, strict=True):
        assert row["alignment_checksum"] == plain_decoder.checksum(ids.tolist(), where.tolist())


def test_datasets_opens_the_folder_with_the_formats_features(real_extraction, stored):
    loaded = datasets.load_dataset(str(real_extraction))
    assert list(loaded) == ["train"]
    value, listed = datasets.Value, datasets.List
    entries = {"logits_quantized": value("binary"), "indices_low": listed(value("uint16"))}
    entries["indices_high"] = value("binary")
    message = {"role": value("string"), "content": value("string"), "extra": value("string")}
    assert loaded["train"].features == datasets.Features(
        {
            **{f"top_{name}": feature for name, feature in entries.items()},
            **{f"sampled_{name}": feature for name, feature in entries.items()},
            "logsumexp": listed(value("float32")),
            "num_tokens": value("int32"),
            **{name: value("float32") for name in ("mean_nll", "mean_entropy", "top1_rate", "max_surprisal")},
            "token_log_probs": listed(value("float32")),
            "messages": listed(message),
            "source_index": value("int64"),
            "alignment_checksum": value("uint32"),
            "tools": value("string"),
        }
    )
    assert list(loaded["train"]) == stored[1]
    for form in ("numpy", "torch"):  # which drop the zeros at the end of bytes
        for index in (7, -1):
            found = logit_codec.dequantize_all_logits(loaded["train"].with_format(form)[3], index)
            expected = logit_codec.dequantize_all_logits(stored[1][3], index)
            assert found.token_ids.tolist() == expected.token_ids.tolist()
            np.testing.assert_array_equal(found.weights, expected.weights)


def test_parquet_is_written_as_the_format_says(real_extraction):
    (path,) = real_extraction.glob("data/*/*.parquet")
    assert path.relative_to(real_extraction).as_posix() == "data/00000/train-00000.parquet"
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)] == [16, 16]
    for i in range(file.metadata.num_columns):
        column = file.metadata.row_group(0).column(i)
        split = column.path_in_schema.split(".")[0] in shard_files._SPLIT_STREAMS
        assert ("BYTE_STREAM_SPLIT" in column.encodings) == split
        assert not any("DICTIONARY" in encoding for encoding in column.encodings)
        assert column.compression == "ZSTD" and not column.is_stats_set
    assert b"ARROW:schema" not in (file.schema_arrow.metadata or {})


def test_the_recorded_template_is_the_options(stored):
    assert stored[0].manifest.chat_template == TEMPLATE.read_text(encoding="utf-8")
    assert stored[0].manifest.mask_source == "generation blocks of --chat_template"


def test_the_summary_is_true(real_extraction, stored):
    summary = (real_extraction.parent.parent / "summary.txt").read_text(encoding="utf-8")
    log_probs = np.concatenate([row["token_log_probs"] for row in stored[1]])
    assert "32 written, 0 skipped" in summary
    assert f"{len(log_probs):,} extracted" in summary
    assert f"mean NLL {-log_probs.mean():.4f} nats, perplexity {np.exp(-log_probs.mean()):.2f}" in summary
    size = sum(path.stat().st_size for path in real_extraction.glob("data/*/*.parquet"))
    assert f"{size / len(log_probs):.1f} bytes a token, {size:,} bytes" in summary
