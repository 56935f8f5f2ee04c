"""Two checkpoints over the same conversations: against reference forward passes, brute force, worked numbers."""

import itertools
import json
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from plain_decoder import decode_position
from runs import flags_for

import explore_logits
import extract_logits
from chat_logits.analysis.comparison import compare_analyses
from chat_logits.analysis.dataset_comparison import compare_datasets
from chat_logits.analysis.divergence import compare_rows, kl_lower_bound
from chat_logits.analysis.row import TokenStatistics
from chat_logits.data.row_alignment import AlignmentError, align_row
from chat_logits.display.results import shown
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import write_shard
from chat_logits.storage.shard_list import shards_text

SIDES = ("first", "other")


@pytest.fixture(scope="module")
def both(real_extraction, other_extraction):
    return open_dataset(str(real_extraction)), open_dataset(str(other_extraction))


@pytest.fixture(scope="module")
def rows(both):
    """Pairs of rows."""
    return list(zip(*(list(dataset.rows()) for dataset in both), strict=True))


@pytest.fixture(scope="module")
def alignments(both, rows, smollm2):
    return [align_row(row, smollm2[1], both[0].manifest) for row, _ in rows]


@pytest.fixture(scope="module")
def compared(rows, alignments):
    """What is tested: a RowComparison a conversation."""
    pairs = zip(rows, alignments, strict=True)
    return [compare_rows(*pair, aligned.input_ids[aligned.positions]) for pair, aligned in pairs]


def unrounded(log_probs: torch.Tensor) -> TokenStatistics:
    """What would be stored of full distributions (n, V) if nothing were rounded."""
    values, ids = log_probs.topk(64)
    probs = values.exp()
    probs *= probs.cumsum(-1) - probs < 0.98
    probs, nothing = probs.numpy(), np.zeros(len(ids))
    return TokenStatistics(
        nothing, nothing, (probs > 0).sum(axis=1), 1 - probs.sum(axis=1), nothing, ids.numpy(), probs
    )


@pytest.fixture(scope="module")
def plain(smollm2, other_checkpoint, alignments):
    """By conversation, from both models' full distributions: KL, its bound without rounding, top ids, log-probs."""
    found = []
    for aligned in alignments:
        ids, where = torch.tensor(aligned.input_ids)[None], aligned.positions
        with torch.inference_mode():
            p, q = (
                torch.log_softmax(model(ids).logits[0, where - 1].double(), -1)
                for model in (smollm2[0], other_checkpoint[0])
            )
        real = ids[0, where, None]
        found.append(
            {
                "kl": (p.exp() * (p - q)).sum(-1).numpy(),
                "bound": kl_lower_bound(unrounded(p), unrounded(q)),
                "agrees": (p.argmax(-1) == q.argmax(-1)).numpy(),
                "log_probs": [part.gather(-1, real)[:, 0].numpy() for part in (p, q)],
            }
        )
    return found


def joined(parts, name: str) -> np.ndarray:
    return np.concatenate([part[name] if isinstance(part, dict) else getattr(part, name) for part in parts])


# --- against reference forward passes of both models ---


def test_no_position_is_above_the_true_divergence(compared, plain):
    true, bound, exact = joined(plain, "kl"), joined(compared, "kl"), joined(plain, "bound")
    print(f"{len(true)} positions: mean KL {true.mean():.4f}, bound {bound.mean():.4f}, unrounded {exact.mean():.4f}")
    sharp = np.maximum(*(np.concatenate([getattr(part, side).tail_mass for part in compared]) for side in SIDES)) < 0.03
    print(f"largest excess {(bound - true).max():.2e}, of rounding {np.abs(bound - exact).max():.2e}")
    print(f"{sharp.sum()} with whole nuclei: mean KL {true[sharp].mean():.4f}, bound {bound[sharp].mean():.4f}")
    assert (exact <= true + 1e-9).all()  # without rounding there is no slack
    assert (bound >= 0).all() and (bound <= true + 5e-3 + 0.02 * true).all()
    assert 0.7 * true.mean() <= bound.mean() <= true.mean()  # the rest is within tails, which no nucleus tells
    assert sharp.sum() > 400 and bound[sharp].mean() >= 0.9 * true[sharp].mean()


def test_agreement_and_log_probabilities_are_the_plain_forwards(compared, plain):
    for found, expected in zip(compared, plain, strict=True):
        change = expected["log_probs"][1] - expected["log_probs"][0]
        np.testing.assert_allclose(found.log_prob_changes, change, atol=2e-4)
        np.testing.assert_allclose(found.first.log_probs, expected["log_probs"][0], atol=1e-4)
        np.testing.assert_array_equal(found.agrees, expected["agrees"])


def test_a_dataset_against_itself_is_nothing_apart(both, smollm2):
    found = compare_datasets(both[0], both[0], smollm2[1])
    assert found.totals.mean_kl == 0 and found.totals.agreement == 1 and found.totals.mean_change == 0
    assert found.totals.perplexity == found.totals.other_perplexity
    assert found.histogram.counts[0] == found.totals.num_tokens
    assert (found.only_in_first, found.only_in_other, found.num_different) == (0, 0, 0)


# --- whole datasets ---


def copied(folder, where, rows: list[dict], **changes):
    """A dataset of some of the rows, in shards of 8 source rows, its ``extraction.json`` changed."""
    manifest = replace(Manifest.read(folder / "extraction.json", "copy"), rows_per_shard=8, **changes)
    entries = []
    where.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        part = [row for row in rows if row["source_index"] // 8 == shard]
        entries.append(write_shard(where, manifest, shard, part, []))
    (where / "extraction.json").write_text(manifest.text)
    (where / "shards.json").write_text(shards_text(entries))
    return open_dataset(str(where))


def naive_totals(pairs, compared) -> list[float]:
    """The six totals by loops over the stored columns, the mean KL by that of each position."""
    agree, surprisals, others, changes, kl = 0, [], [], [], []
    for (row, other_row), found in zip(pairs, compared, strict=True):
        kl += found.kl.tolist()
        for i in range(row["num_tokens"]):
            tops = [decode_position(each, i, 64, 16)["nucleus"][0][0] for each in (row, other_row)]
            agree += tops[0] == tops[1]
            surprisals.append(-row["token_log_probs"][i])
            others.append(-other_row["token_log_probs"][i])
            changes.append(abs(surprisals[-1] - others[-1]))
    n = len(kl)
    perplexities = (math.exp(sum(surprisals) / n), math.exp(sum(others) / n))
    return [n, sum(kl) / n, agree / n, *perplexities, sum(changes) / n]


def test_totals_and_what_is_furthest_apart_are_those_of_all_rows(both, rows, compared, alignments, smollm2):
    found = compare_datasets(*both, smollm2[1])
    assert list(astuple(found.totals)) == pytest.approx(naive_totals(rows, compared))
    kl = joined(compared, "kl").tolist()
    edges = [0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, math.inf]
    assert found.histogram.edges == edges[:-1] and found.histogram.bins[-1][1] is None
    assert found.histogram.counts == [
        sum(start <= value < end for value in kl) for start, end in itertools.pairwise(edges)
    ]
    ranked = sorted(
        ((float(value), -row, -i) for row, part in enumerate(compared) for i, value in enumerate(part.kl)), reverse=True
    )
    for token, (value, row, i) in zip(found.tokens, ranked[:20], strict=True):
        aligned = alignments[-row]
        position = aligned.positions[-i]
        assert (token.kl, token.sample_index, token.position) == (value, -row, position)
        assert token.text == smollm2[1].decode(aligned.input_ids[position])
        assert token.before == smollm2[1].decode(aligned.input_ids[max(0, position - 12) : position])
        for side, prediction, log_prob in zip(
            rows[-row], (token.prediction, token.other_prediction), (token.log_prob, token.other_log_prob), strict=True
        ):
            top_id, top_p = decode_position(side, -i, 64, 16)["nucleus"][0]
            assert (prediction.token_id, prediction.probability) == (top_id, pytest.approx(top_p))
            assert prediction.text == smollm2[1].decode(top_id) and log_prob == side["token_log_probs"][-i]


def test_conversations_furthest_apart(both, rows, compared, smollm2):
    found = compare_datasets(*both, smollm2[1]).conversations
    means = sorted(((float(np.mean(part.kl)), row) for row, part in enumerate(compared)), reverse=True)[:5]
    assert [(entry.mean_kl, entry.sample_index) for entry in found] == [(pytest.approx(kl), row) for kl, row in means]
    for entry in found:
        row, other_row = rows[entry.sample_index]
        assert entry.question == row["messages"][0]["content"][:80] and entry.num_tokens == row["num_tokens"]
        assert entry.perplexity == pytest.approx(math.exp(-np.mean(row["token_log_probs"])))
        assert entry.other_perplexity == pytest.approx(math.exp(-np.mean(other_row["token_log_probs"])))


@pytest.fixture
def partial(real_extraction, other_extraction, rows, tmp_path):
    """The first without source rows 0, 9 and 31; the other without 9, 10 to 12, with row 20 changed."""
    first = [row for row, _ in rows if row["source_index"] not in (0, 9, 31)]
    other = [dict(row) for _, row in rows if row["source_index"] not in range(9, 13)]
    next(row for row in other if row["source_index"] == 20)["alignment_checksum"] ^= 1
    first = copied(real_extraction, tmp_path / "first", first)
    return first, copied(other_extraction, tmp_path / "second", other, dataset_revision="0" * 64, split="train")


def test_rows_of_one_dataset_alone_are_counted_and_left_out(partial, rows, compared, smollm2):
    found = compare_datasets(*partial, smollm2[1])
    shared = [i for i in range(32) if i not in (0, 9, 31, 10, 11, 12, 20)]
    assert (found.num_conversations, found.only_in_first, found.only_in_other, found.num_different) == (25, 3, 2, 1)
    expected = naive_totals([rows[i] for i in shared], [compared[i] for i in shared])
    assert list(astuple(found.totals)) == pytest.approx(expected)
    assert {token.source_index for token in found.tokens} <= set(shared)
    numbers = {row["source_index"]: i for i, row in enumerate(partial[0].rows())}
    assert all(token.sample_index == numbers[token.source_index] for token in found.tokens)


def test_a_row_whose_tokens_are_others_is_named_by_its_number(
    real_extraction, other_extraction, rows, tmp_path, smollm2
):
    """Row 4 of the first, of source row 6: the first row that is compared, so its tokens are among those listed."""
    changed = [[{**row, "alignment_checksum": row["alignment_checksum"] ^ 1} for row in pair] for pair in rows]
    first = copied(real_extraction, tmp_path / "first", [rows[i][0] for i in range(2, 6)] + [changed[6][0]])
    other = copied(other_extraction, tmp_path / "second", [changed[6][1]])
    message = "^row 4: column alignment_checksum: the rebuilt conversation"
    with pytest.raises(AlignmentError, match=message):
        compare_datasets(first, other, smollm2[1])
    for sample_index in (4, -1):
        with pytest.raises(AlignmentError, match=message):
            compare_analyses(first, other, smollm2[1], sample_index)


def test_the_other_way_round_the_counts_change_sides(partial, smollm2):
    found = compare_datasets(*partial[::-1], smollm2[1])
    assert (found.num_conversations, found.only_in_first, found.only_in_other, found.num_different) == (25, 2, 3, 1)


def test_nothing_shared_is_an_error(real_extraction, other_extraction, rows, tmp_path, smollm2):
    halves = (
        copied(real_extraction, tmp_path / "a", [row for row, _ in rows[:16]]),
        copied(other_extraction, tmp_path / "b", [row for _, row in rows[16:]]),
    )
    with pytest.raises(ToolkitError, match=r"no conversation \(0 source rows in both\); expected") as error:
        compare_datasets(*halves, smollm2[1])
    assert error.value.exit_status == 1


def test_what_decides_the_tokens_and_differs_is_named(quick_run, flags, tmp_path, capsys):
    """Runs that differ in which tokens they have extracted: with ends of turns, and without a token."""
    again = "Extract one of them again with the options of the other.\n"
    kept = "their runs differ in keep_end_of_turn (null and true). " + again
    assert extract_logits.main(flags("kept", "--keep_end_of_turn")) == 0
    capsys.readouterr()
    assert explore_logits.main([str(quick_run), "--compare", str(tmp_path / "kept")]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"share no conversation (160 source rows in both, with other tokens); {kept}")
    compared = [str(quick_run), "--compare", str(tmp_path / "kept"), "--sample_index", "1"]
    assert explore_logits.main(compared) == 1
    assert capsys.readouterr().err.endswith(f"has other tokens there than in {quick_run}; {kept}")


def test_rows_of_two_sources_are_compared_where_their_conversations_are_the_same(
    quick_model, chat_file, tmp_path, capsys
):
    """By one model, so that what is compared is 0 apart; every other conversation of the second source is another."""
    texts = [[f"{word} is {i}" if i % 2 else f"It is {i}" for i in range(6)] for word in ("One", "Another")]
    for name, answers in zip(("first", "other"), texts, strict=True):
        source = chat_file([{"question": "What?", "answer": answer} for answer in answers], f"{name}.jsonl")
        assert extract_logits.main(flags_for(quick_model, source, tmp_path / name)) == 0
    first, other = (str(tmp_path / name) for name in ("first", "other"))
    found = explore_logits.execute_comparison(first, other, quiet=True)
    assert (found.num_conversations, found.only_in_first, found.only_in_other, found.num_different) == (3, 0, 0, 3)
    assert sorted(each.sample_index for each in found.conversations) == [0, 2, 4]
    assert found.totals.mean_change < 1e-5
    assert explore_logits.main([first, "--compare", other, "--sample_index", "1"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        f"error: {other}: source row 1 has other tokens there than in {first}; their runs differ in "
    )


def test_only_what_decides_the_tokens_is_named(both, rows, other_extraction, smollm2, tmp_path):
    changed = [{**row, "alignment_checksum": row["alignment_checksum"] ^ 1} for _, row in rows]
    message = r"32 source rows in both, with other tokens\); "
    cases = [
        ({"top_p": 0.5}, "expected the same conversations, extracted with the same template$"),
        ({"chat_template": "{{ messages }}" * 9}, r"their runs differ in chat_template\. Extract one"),
        (
            {"all_turns": True, "template_kwargs": {"think": False}, "seed": 1},
            r"their runs differ in all_turns \(false and true\), template_kwargs\.think \(null and false\)\. Extract",
        ),
    ]
    for number, (changes, named) in enumerate(cases):
        other = copied(other_extraction, tmp_path / str(number), changed, **changes)
        with pytest.raises(ToolkitError, match=message + named):
            compare_datasets(both[0], other, smollm2[1])


def test_another_tokenizer_is_refused(both, smollm2):
    other = replace(both[1], manifest=replace(both[1].manifest, tokenizer_fingerprint="f" * 64))
    for compare in (compare_datasets, compare_analyses):
        with pytest.raises(UsageError, match="another tokenizer"):
            compare(both[0], other, smollm2[1])


def test_a_dataset_comparison_as_json(both, smollm2):
    found = compare_datasets(*both, smollm2[1])
    content = json.loads(shown(found).to_json(), parse_constant=pytest.fail)
    assert content["totals"]["mean_kl"] == found.totals.mean_kl and content["histogram"]["is_open_ended"]
    assert content["other"] == {
        "logit_dataset_id": both[1].dataset_id,
        "model_id": both[1].manifest.model_id,
    }
    assert content["tokens"][0]["other_prediction"]["text"] == found.tokens[0].other_prediction.text


# --- one conversation ---


def test_a_conversations_tokens(both, rows, compared, alignments, smollm2):
    found = compare_analyses(*both, smollm2[1], sample_index=-25, top_n=3)
    row, other_row = rows[7]
    assert (found.sample_index, found.other_sample_index, found.source_index) == (7, 7, 7)
    assert [pair.first.token_id for pair in found] == alignments[7].input_ids.tolist()
    extracted = [pair for pair in found if pair.is_extracted]
    assert [pair.first.position for pair in extracted] == alignments[7].positions.tolist()
    assert [pair.kl for pair in extracted] == compared[7].kl.tolist()
    for i, pair in enumerate(extracted):
        for told, side in ((pair.first, row), (pair.other, other_row)):
            nucleus = decode_position(side, i, 64, 16)["nucleus"]
            assert [entry.token_id for entry in told.predictions] == [token_id for token_id, _ in nucleus[:3]]
            ranks = [token_id for token_id, _ in nucleus]
            assert told.rank == (ranks.index(told.token_id) + 1 if told.token_id in ranks else None)
            assert told.log_prob == side["token_log_probs"][i]
    others = [pair for pair in found if not pair.is_extracted]
    assert {pair.first.status for pair in others} == {"prompt", "skipped"}
    assert all(pair.kl is pair.agrees is pair.log_prob_change is None for pair in others)
    assert list(astuple(found.totals)) == pytest.approx(naive_totals([rows[7]], [compared[7]]))


def test_only_the_tokens_furthest_apart(both, compared, smollm2):
    found = compare_analyses(*both, smollm2[1], 3, only=4)
    assert [pair.kl for pair in found.shown] == sorted(compared[3].kl.tolist(), reverse=True)[:4]
    content = json.loads(shown(found).to_json(), parse_constant=pytest.fail)
    assert [token["kl"] for token in content["tokens"]] == [pair.kl for pair in found.shown]
    assert content["tokens"][0]["other"]["predictions"] and content["totals"]["num_tokens"] == len(compared[3].kl)


def test_the_other_row_is_the_same_source_row(partial, smollm2):
    for sample_index, source_index, other_index in ((0, 1, 1), (11, 13, 9), (28, 30, 26)):
        found = compare_analyses(*partial, smollm2[1], sample_index)
        assert (found.source_index, found.other_sample_index) == (source_index, other_index)
        assert found.messages == partial[1].read_row(other_index)["messages"]


def test_the_same_row_is_tried_first(other_extraction, both, rows, smollm2, tmp_path):
    """Of four shards only the row's own is there: no other row can have been read."""
    other = copied(other_extraction, tmp_path / "other", [row for _, row in rows])
    for number in (0, 1, 2):
        (tmp_path / "other" / f"data/00000/train-{number:05d}.parquet").unlink()
    found = compare_analyses(both[0], other, smollm2[1], 27)
    assert (found.sample_index, found.other_sample_index, found.source_index) == (27, 27, 27)
    with pytest.raises(ToolkitError, match=r"no data/00000/train-00000\.parquet"):
        compare_analyses(both[0], other, smollm2[1], 3)


def test_an_empty_nucleus_predicts_nothing(real_extraction, both, rows, smollm2, tmp_path):
    """And agrees with nothing, not with another empty one either."""
    emptied = []
    for row, _ in rows:
        n = row["num_tokens"] * 64
        nothing = {"top_logits_quantized": bytes(n), "top_indices_low": [0] * n, "top_indices_high": bytes(n // 4)}
        emptied.append({**row, **nothing})
    empty = copied(real_extraction, tmp_path / "empty", emptied)
    found = compare_datasets(both[0], empty, smollm2[1])
    assert all(token.other_prediction is None and token.prediction for token in found.tokens)
    assert found.totals.agreement == 0 and found.totals.perplexity == found.totals.other_perplexity
    assert compare_datasets(empty, empty, smollm2[1]).totals.agreement == 0
    shown(found).print()


@pytest.mark.parametrize(("sample_index", "message"), [(8, "source row 10 is not in it"), (18, "has other tokens")])
def test_another_conversation_is_refused(partial, smollm2, sample_index, message):
    with pytest.raises(ToolkitError, match=message):
        compare_analyses(*partial, smollm2[1], sample_index)
