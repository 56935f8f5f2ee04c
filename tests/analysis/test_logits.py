"""A dataset as one object, against the stored rows and the functions that give the same a result at a time."""

import builtins
import copy
import math
from functools import partial

import datasets
import numpy as np
import pytest
from conftest import MODEL
from runs import rows_in

import chat_logits
import explore_logits
from chat_logits import open_logits
from chat_logits.errors import UsageError
from chat_logits.storage.dataset import open_dataset
from chat_logits.training.dataset import training_dataset
from explore_logits import (
    execute_analysis,
    execute_budget,
    execute_comparison,
    execute_filtering,
    execute_student,
    execute_summary,
    execute_thinning,
    execute_verification,
)
from logit_codec import ROW_NUMBERS, dequantize_all_logits

LOADED = datasets.DatasetDict(train=datasets.Dataset.from_dict({f"column {i}": [1] for i in range(40)}))
LOADED_IS_REFUSED = "a DatasetDict: expected the folder or the Hub id of a logit dataset, such as user/logits; what "


@pytest.fixture(scope="module")
def logits(quick_run):
    return open_logits(quick_run)


@pytest.fixture(scope="module")
def rows(quick_run):
    return rows_in(quick_run)


@pytest.fixture(scope="module")
def other_rows(other_run):
    return rows_in(other_run)


def test_it_is_a_sequence_of_the_stored_rows(logits, rows):
    assert len(logits) == len(rows) == len(list(logits))
    assert [conversation.row for conversation in logits] == list(range(len(rows)))
    assert logits[-1].row == logits[np.int64(len(rows) - 1)].row == len(rows) - 1
    assert [conversation.source_index for conversation in logits[:20]] == [row["source_index"] for row in rows[:20]]
    assert logits[3].stored == rows[3]
    assert open_logits is chat_logits.open_logits is explore_logits.open_logits


def test_slices_and_lists_stay_what_they_are(logits):
    part = logits[10:40:3]
    assert type(part) is type(logits) and len(part) == 10
    assert part.stored_rows.tolist() == list(range(10, 40, 3)) and part[2:4].stored_rows.tolist() == [16, 19]
    assert part[1].row == 13 and part[-1].row == 37 and [one.row for one in part[[0, -1]]] == [10, 37]
    assert logits[5:5].stored_rows.tolist() == [] and logits[[]].stored_rows.tolist() == []
    assert part.source_indices == [one.source_index for one in part]


def test_nothing_is_read_before_it_is_needed(quick_run, tmp_path, monkeypatch):
    """Numbers and conditions need no tokenizer, and making a conversation reads no row."""
    monkeypatch.chdir(tmp_path)
    logits = open_logits(str(quick_run), tokenizer_id=str(tmp_path))
    assert len(logits.where("num_tokens > 100").rows("arrow")) > 10 and logits[7].stored["num_tokens"]
    with pytest.raises(chat_logits.errors.ToolkitError):
        len(logits[7])


def test_a_conversation_is_the_analysis_of_its_row(logits, quick_run, rows):
    conversation = logits[12]
    expected = execute_analysis(str(quick_run), 12, quiet=True)
    assert list(conversation) == list(conversation.tokens) == list(expected) and len(conversation) == len(expected)
    assert conversation.totals == expected.totals and str(conversation.analysis) == str(expected)
    assert conversation.to_json() == expected.to_json() and conversation.to_html() == expected.to_html()
    assert [one.token_id for one in conversation.to_frame().itertuples()] == [one.token_id for one in expected]
    part = conversation[5:30]
    assert type(part) is type(expected) and list(part) == list(expected)[5:30] and part[0] == expected[5]
    assert conversation.messages == [
        {key: value for key, value in message.items() if key != "extra"} for message in rows[12]["messages"]
    ]
    three = conversation.analyze(top_n=3, only=2)
    assert three.to_json() == execute_analysis(str(quick_run), 12, top_n=3, only=2, quiet=True).to_json()


def test_a_token_knows_its_places(logits, rows):
    conversation = logits[12]
    assert [token.position for token in conversation] == list(range(len(conversation)))
    extracted = [token for token in conversation if token.is_extracted]
    assert [token.index for token in extracted] == list(range(rows[12]["num_tokens"]))
    assert {token.index for token in conversation if not token.is_extracted} == {None}
    for token in extracted:
        assert token.log_prob == np.float32(rows[12]["token_log_probs"][token.index])
        position = dequantize_all_logits(rows[12], token.index)
        nucleus = position.token_ids[~position.is_sampled]
        assert [one.token_id for one in token.predictions] == nucleus[:5].tolist()
    assert extracted[3] in conversation[extracted[3].position : extracted[3].position + 1]
    assert extracted[3].as_dict()["index"] == 3


def test_tokens_without_any_extracted_have_no_means(logits):
    totals = logits[12][:3].totals
    assert totals.num_tokens == 0 and math.isnan(totals.perplexity) and math.isnan(totals.stored)


@pytest.mark.parametrize("kind", ["pandas", "polars", "duckdb", "arrow"])
def test_rows_are_a_frame_of_their_numbers(kind, logits, rows):
    frame = logits.where("num_tokens > 100").rows(kind)
    names = ["row", "source_index", "num_tokens", "mean_nll", "perplexity", *ROW_NUMBERS[1:]]
    assert list(frame.columns if kind != "arrow" else frame.column_names) == names
    if kind == "pandas":
        found = frame.to_dict("records")
    elif kind == "polars":
        found = frame.to_dicts()
    elif kind == "arrow":
        found = frame.to_pylist()
    else:
        found = [dict(zip(names, values, strict=True)) for values in frame.fetchall()]
    expected = [(i, row) for i, row in enumerate(rows) if row["num_tokens"] > 100]
    assert [row["row"] for row in found] == [i for i, _ in expected]
    for one, (_, row) in zip(found, expected, strict=True):
        assert all(one[name] == row[name] for name in ("source_index", "num_tokens", *ROW_NUMBERS))


def test_a_package_that_is_not_there_is_named(logits, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name in ("polars", "duckdb"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"rows\('polars'\) needs polars, which is not installed: pip install polars"):
        logits.rows("polars")
    with pytest.raises(UsageError, match="`where` needs DuckDB, which is not installed: pip install duckdb"):
        logits.where("true")


def test_conditions_narrow_each_other(logits, rows, tmp_path):
    expected = [i for i, row in enumerate(rows) if row["num_tokens"] > 100 and row["source_index"] % 2]
    narrowed = logits.where("num_tokens > 100 -- long").where("source_index % 2 = 1")
    assert narrowed.stored_rows.tolist() == expected
    assert logits[40:].where("true").stored_rows.tolist() == list(range(40, len(rows)))
    narrowed.save(tmp_path / "both")
    both = open_logits(tmp_path / "both")
    assert [one.stored for one in both] == [rows[i] for i in expected]
    (origin,) = both.manifest.filtered_from
    assert logits.where(origin["condition"]).stored_rows.tolist() == expected
    narrowed[1:3].save(tmp_path / "two")
    assert open_logits(tmp_path / "two").manifest.filtered_from[0]["rows"] == expected[1:3]
    assert [one["source_index"] for one in narrowed.messages()] == narrowed.source_indices


def test_summaries_and_comparisons_are_the_functions(logits, quick_run):
    place = str(quick_run)
    assert logits.summary().to_json() == execute_summary(place, quiet=True).to_json()
    expected = execute_comparison(place, place, quiet=True).to_json()
    assert logits.compare(quick_run).to_json() == logits.compare(open_logits(quick_run)).to_json() == expected
    expected = execute_comparison(place, place, 9, top_n=3, only=4, quiet=True).to_json()
    assert logits[9].compare(logits, top_n=3, only=4).to_json() == expected
    assert logits[9].compare(open_logits(quick_run)[1], top_n=3, only=4).to_json() == expected


def test_a_summary_of_some_conversations_is_theirs(logits, rows):
    chosen = [i for i, row in enumerate(rows) if row["num_tokens"] > 100 and i % 2]
    summary = logits.where("num_tokens > 100 AND row % 2 = 1").summary()
    log_probs = np.concatenate([np.asarray(rows[i]["token_log_probs"], np.float64) for i in chosen])
    assert (summary.num_conversations, summary.num_tokens) == (len(chosen), len(log_probs))
    assert summary.chosen_from == len(rows) and summary.num_bytes is None
    assert summary.mean_nll == pytest.approx(-log_probs.mean(), rel=1e-12)
    for name in ("mean_entropy", "top1_rate"):
        means, tokens = ([rows[i][column] for i in chosen] for column in (name, "num_tokens"))
        assert getattr(summary, name) == pytest.approx(np.average(means, weights=tokens), rel=1e-6)
    losses = sorted((-nll, i) for i in chosen for nll in map(float, rows[i]["token_log_probs"]))[::-1]
    assert [loss.log_prob for loss in summary.largest_losses] == pytest.approx([-nll for nll, _ in losses[:20]])
    assert {loss.sample_index for loss in summary.largest_losses} <= set(chosen)
    assert logits[[chosen[1], chosen[0], chosen[1]]].summary().num_conversations == 2
    assert f"{len(chosen)} chosen of {len(rows)}" in summary.to_html()


def test_a_comparison_of_some_conversations_is_theirs(logits, rows, other_run, other_rows):
    chosen = [i for i, row in enumerate(rows) if i % 3 == 0]
    there = {row["source_index"] for row in other_rows}
    both = [i for i in chosen if rows[i]["source_index"] in there]
    assert 0 < len(both) < len(chosen)
    found = logits[::3].compare(other_run)
    alone = [logits[i].compare(other_run).totals for i in both]
    tokens = [each.num_tokens for each in alone]
    assert (found.num_conversations, found.totals.num_tokens) == (len(both), sum(tokens))
    assert (found.only_in_first, found.only_in_other, found.chosen_from) == (len(chosen) - len(both), 0, len(rows))
    for name in ("mean_kl", "agreement"):
        each = [getattr(totals, name) for totals in alone]
        assert getattr(found.totals, name) == pytest.approx(np.average(each, weights=tokens), rel=1e-9)
    kls = sorted(token.kl for i in both for token in logits[i].compare(other_run) if token.kl is not None)[::-1]
    assert [token.kl for token in found.tokens] == pytest.approx(kls[: len(found.tokens)])
    assert {token.sample_index for token in found.tokens} <= set(both)
    other = open_logits(other_run)
    part = other[[i for i, row in enumerate(other_rows) if row["source_index"] % 2]]
    odd = [i for i in both if rows[i]["source_index"] % 2]
    assert (
        logits[::3].compare(part).num_conversations
        == len(odd)
        == len(both) - sum(rows[i]["source_index"] % 2 == 0 for i in both)
    )
    assert logits.compare(part).num_conversations == len(part)


def test_it_prints_when_it_is_asked_to(logits, capsys):
    found = logits.where("num_tokens > 180")
    found[0].totals, found.listed(), found[0][3:5]
    assert capsys.readouterr().out == ""
    found.print()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.count("|") == 7]
    assert [int(line.split("|")[0]) for line in lines[1:]] == found.stored_rows.tolist()
    found[0].print()
    assert capsys.readouterr().out.startswith("Detailed Token Analysis:")


@pytest.mark.parametrize("mode", ["summary", "verify", "student"])
def test_quiet_functions_draw_no_bar_and_the_command_does(mode, quick_run, quick_model, capsys):
    execute, words = {
        "summary": (execute_summary, ["--summary"]),
        "verify": (partial(execute_verification, verify=2), ["--verify", "2"]),
        "student": (partial(execute_student, student=quick_model, student_rows=2), ["--student", str(quick_model)]),
    }[mode]
    execute(str(quick_run), quiet=True)
    assert "conversations" not in capsys.readouterr().err
    assert explore_logits.main([str(quick_run), *words]) == 0
    assert " conversations/s]" in capsys.readouterr().err


def test_a_conversation_is_found_in_its_dataset(logits, quick_run, other_run):
    again = open_logits(quick_run)
    assert logits[4] in again and again.index(logits[4]) == 4 and again.count(logits[-1]) == 1
    assert logits[4] == again[4] and logits[4] != again[5] and logits[4] != open_logits(other_run)[4]
    assert logits[4] != 4 and len({logits[4], again[4], logits[5]}) == 2
    assert logits[:3].count(logits[7]) == 0


def test_an_error_below_a_property_is_not_hidden(logits):
    """An AttributeError, which Python takes for a missing attribute and asks ``__getattr__``."""
    conversation = copy.copy(logits[0])
    conversation.logits = None
    for ask in (lambda: conversation.stored, lambda: conversation.analysis, lambda: len(conversation)):
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
            ask()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = logits[0].nothing


def test_the_users_own_folder_is_written_as_a_tilde(logits, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    logits[:2].save("~/two.txt")
    logits[:2].save("~/two")
    explore_logits.execute_filtering(str(logits.dataset.dataset_id), "row < 2", "~/found.txt", quiet=True)
    explore_logits.execute_thinning(str(logits.dataset.dataset_id), (8, 4, 0.9, "~/thin"), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.txt", "thin", "two", "two.txt"]


def test_reprs_are_a_line(logits, quick_run):
    assert repr(logits) == f"<Logits {quick_run}: {len(logits)} conversations>"
    assert repr(logits.where("num_tokens\n> 100")).endswith(" conversations with num_tokens > 100>")
    assert repr(logits[2]) == f"<Conversation: row 2 of {quick_run}>"
    analysis = logits[2].analysis
    extracted = next(token for token in analysis if token.is_extracted)
    assert repr(extracted).startswith(f"<TokenAnalysis {extracted.position} {extracted.text!r} (extracted): log_prob -")
    parts = (logits, logits[2:4], logits.dataset, logits[2], analysis, analysis[:3], logits.listed(), extracted)
    for part in (*parts, logits.summary(), logits.compare(logits), logits[2].compare(logits)):
        assert "\n" not in repr(part) and len(repr(part)) < 300
    assert copy.copy(logits[2]).row == 2


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda _: open_logits(3), TypeError, "a int: expected the folder or the Hub id"),
        (lambda _: open_logits(LOADED), TypeError, LOADED_IS_REFUSED),
        (lambda _: training_dataset(LOADED), TypeError, LOADED_IS_REFUSED),
        (lambda _: training_dataset(LOADED["train"], streaming=True), TypeError, "a Dataset: expected the folder"),
        (lambda _: execute_verification(LOADED, 1), TypeError, LOADED_IS_REFUSED),
        (lambda _: execute_student(LOADED, MODEL), TypeError, LOADED_IS_REFUSED),
        (lambda _: execute_budget(LOADED), TypeError, LOADED_IS_REFUSED),
        (lambda _: execute_filtering(LOADED, "row > 0"), TypeError, LOADED_IS_REFUSED),
        (lambda _: execute_thinning(LOADED, (5, 5, 0.5, "x")), TypeError, LOADED_IS_REFUSED),
        (lambda logits: logits.compare(LOADED), TypeError, "a DatasetDict: expected a logit dataset, opened, or"),
        (lambda logits: logits["x"], TypeError, "'x' of <Logits .*expected a whole number, a slice, or a list"),
        (lambda logits: logits[1.5], TypeError, "expected a whole number"),
        (lambda logits: logits[True], TypeError, "expected a whole number"),
        (lambda logits: logits[[1, "x"]], TypeError, "expected a whole number"),
        (lambda logits: logits[10_000], IndexError, "10000 of <Logits .*: expected 0 to "),
        (lambda logits: logits[:0][0], IndexError, "0 of <Logits .*expected nothing"),
        (lambda logits: logits[0]["x"], TypeError, "'x' of <Conversation: row 0 .*expected a whole number or a slice"),
        (lambda logits: logits.rows("csv"), TypeError, "expected one of pandas, polars, duckdb, arrow"),
        (lambda logits: logits.compare(3), TypeError, "a int: expected a logit dataset"),
        (lambda logits: logits.where(3), UsageError, "expected a condition as text"),
        (lambda logits: logits[:2].save(None), TypeError, r"save\(None\): expected FILE.jsonl, FILE.txt or a folder"),
        (lambda logits: logits[:2].save("~nouser/x"), UsageError, "`save` ~nouser/x: no such user; expected"),
        (lambda logits: logits[:2].save("a\0b"), UsageError, "not a valid file name"),
        (lambda logits: logits[:2].save("x" * 300), UsageError, "`save` x{80}: File name too long"),
        (lambda logits: logits[:0].summary(), UsageError, "nothing to make a summary of"),
        (lambda logits: logits[:0].compare(logits), UsageError, "nothing to make a comparison of"),
        (lambda logits: logits.compare(logits[:0]), UsageError, "nothing to make a comparison of"),
    ],
)
def test_wrong_use_is_told_in_a_line(wrong, kind, message, logits):
    with pytest.raises(UsageError, match=message) as caught:
        wrong(logits)
    assert isinstance(caught.value, kind) and "\n" not in str(caught.value)


def test_a_row_that_is_not_there_is_named_by_the_option(quick_run):
    rows = open_dataset(str(quick_run)).num_rows
    with pytest.raises(UsageError, match=f"sample_index {rows}: .* has {rows} rows, 0 to {rows - 1}"):
        execute_analysis(str(quick_run), rows)
