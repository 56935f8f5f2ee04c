"""A run over rows with tools and marks: what is stored, and every way of reading it."""

import json

import pytest
from conftest import REPO

import explore_logits
import extract_logits
from chat_logits.analysis.dataset_comparison import compare_datasets
from chat_logits.analysis.opening import open_with_tokenizer
from chat_logits.analysis.summary import summarize
from chat_logits.analysis.verification import verify
from chat_logits.storage.dataset import open_dataset

QWEN = REPO / "templates" / "qwen2_5.jinja"


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "description": "é", "parameters": {"type": "object"}}}


def row(number: int) -> dict:
    turns = [("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
    messages = [{"role": role, "content": f"{text} {number}"} for role, text in turns]
    messages[1] |= [{"weight": 0}, {}, {"train": False}][number % 3]
    return {"messages": messages, "tools": [None, [tool(f"find_{number}")], json.dumps([tool("look")])][number % 3]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "chats.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(6)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(quick_model, source, tmp_path_factory):
    def extracted(*more) -> tuple:
        out = tmp_path_factory.mktemp("runs") / "out"
        options = {"model_id": quick_model, "dataset_id": source, "output_dir": out, "chat_template": QWEN}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        assert extract_logits.main([*flags, "--device", "cpu", "--rows_per_shard", "4", *more]) == 0
        return out

    return extracted


@pytest.fixture(scope="module")
def marked(run):
    return run()


def test_tools_are_stored_and_used_again(marked):
    rows = list(open_dataset(str(marked)).rows())
    stored = [None, tool("find_1"), tool("look"), None, tool("find_4"), tool("look")]
    assert [each["tools"] for each in rows] == [
        each and json.dumps([each], separators=(",", ":"), ensure_ascii=False) for each in stored
    ]
    for number, name in enumerate((None, "find_1", "look")):
        analysis = explore_logits.execute_analysis(str(marked), number, quiet=True)
        text = "".join(token.text for token in analysis)
        assert (f'"name": "{name}"' in text) if name else "# Tools" not in text
        extracted = "".join(token.text for token in analysis if token.is_extracted)
        assert extracted == ("First. 1Second. 1" if number == 1 else f"Second. {number}")
        left_out = "".join(t.text for t in analysis if t.reason == "marked not to be trained on")
        assert left_out.startswith("" if number == 1 else f"First. {number}")


def test_changed_tools_do_not_match_the_checksum(marked):
    from chat_logits.data.row_alignment import AlignmentError, RowAligner

    dataset, tokenizer = open_with_tokenizer(str(marked))
    aligner, stored = RowAligner(tokenizer, dataset.manifest), dataset.read_row(1)
    aligner.align(stored)
    for changed in (None, stored["tools"].replace("find_1", "find_2")):
        with pytest.raises(AlignmentError, match="column alignment_checksum"):
            aligner.align({**stored, "tools": changed})


def test_summary_comparison_and_verification_read_the_same_tokens(marked, capsys):
    dataset, tokenizer = open_with_tokenizer(str(marked))
    summary = summarize(dataset, tokenizer)
    assert (summary.num_conversations, summary.turns_left_out) == (6, 4)
    assert summary.as_dict()["turns_left_out"] == 4
    assert explore_logits.main(["--logit_dataset_id", str(marked), "--summary"]) == 0
    assert "Left out       4 turns marked not to be trained on" in capsys.readouterr().out
    checked = verify(dataset, tokenizer, 6)
    assert checked.holds, checked.causes
    compared = compare_datasets(dataset, dataset, tokenizer)
    assert compared.num_conversations == 6 and compared.totals.num_tokens == summary.num_tokens


def test_marks_are_counted_and_switched_off(run, source, marked, capsys):
    everything = run("--all_turns")
    assert "Left out" not in capsys.readouterr().out
    described = [json.loads((out / "extraction.json").read_text()) for out in (marked, everything)]
    assert [content["all_turns"] for content in described] == [False, True]
    assert open_dataset(str(marked)).manifest.fingerprint != open_dataset(str(everything)).manifest.fingerprint
    entries = [json.loads((out / "shards.json").read_text())["shards"] for out in (marked, everything)]
    assert [[entry["turns_left_out"] for entry in each] for each in entries] == [[3, 1], [0, 0]]
    text = "".join(t.text for t in explore_logits.execute_analysis(str(everything), 0, quiet=True) if t.is_extracted)
    assert text == "First. 0Second. 0"
    again = ["--model_id", described[0]["model_id"], "--dataset_id", str(source), "--output_dir", str(marked)]
    again += ["--chat_template", str(QWEN), "--device", "cpu", "--rows_per_shard", "4", "--check_shards"]
    assert extract_logits.main(again) == 0
    assert "Left out       4 turns marked not to be trained on (weight, train, loss)" in capsys.readouterr().out
    assert extract_logits.main([*again, "--all_turns"]) == 2
    assert "all_turns: false there, true here" in capsys.readouterr().err


def test_ends_of_turns_are_kept_and_read_again(run, marked, capsys):
    """One token more for each turn that is extracted, whose distribution a fresh forward pass confirms."""
    kept = run("--keep_end_of_turn")
    described = [json.loads((out / "extraction.json").read_text()) for out in (marked, kept)]
    assert [content.get("keep_end_of_turn") for content in described] == [None, True]
    before, after = ([row["num_tokens"] for row in open_dataset(str(out)).rows()] for out in (marked, kept))
    turns = [1, 2, 1, 1, 2, 1]
    assert [b - a for a, b in zip(before, after, strict=True)] == turns
    analysis = explore_logits.execute_analysis(str(kept), 1, quiet=True)
    assert "".join(t.text for t in analysis if t.is_extracted) == "First. 1<|im_end|>Second. 1<|im_end|>"
    dataset, tokenizer = open_with_tokenizer(str(kept))
    checked = verify(dataset, tokenizer, 6)
    assert checked.holds, checked.causes
    capsys.readouterr()
    again = ["--model_id", described[0]["model_id"], "--dataset_id", described[0]["dataset_id"], "--device", "cpu"]
    again += ["--chat_template", str(QWEN), "--rows_per_shard", "4", "--output_dir", str(kept)]
    assert extract_logits.main([*again, "--no_keep_end_of_turn"]) == 2
    assert "keep_end_of_turn: true there, null here" in capsys.readouterr().err


def test_ends_are_not_kept_where_no_token_ends_a_turn(quick_model, source, tmp_path, capsys):
    """A template that ends answers with white space alone."""
    answer = "{% generation %}{{ m.content }}{% endgeneration %}"
    bare = f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% else %}}{answer}{{% endif %}}"
    bare += "{{ ' ' }}{% endfor %}"
    flags = ["--model_id", quick_model, "--dataset_id", source, "--output_dir", tmp_path / "out"]
    more = ["--chat_template", bare, "--tools_column", "", "--keep_end_of_turn"]
    assert extract_logits.main([*map(str, flags), *more]) == 2
    assert "--keep_end_of_turn: no special token ends an answer of the first 6" in capsys.readouterr().err
