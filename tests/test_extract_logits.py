"""The extraction command as its user meets it: what it writes, what it skips, what it refuses."""

import json
import re

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TEMPLATE, make_tiny_model
from transformers import AutoTokenizer

import extract_logits
import logit_codec
from chat_logits.storage.dataset import open_dataset

GOOD = {"question": "What is the capital of France?", "answer": "Paris, on the Seine."}


@pytest.fixture
def extract(small_model, tmp_path):
    """Run the command in this process on a small random model; options given replace the defaults."""

    def run(dataset_id, *flags, **options) -> int:
        defaults = {"model_id": small_model, "chat_template": TEMPLATE, "output_dir": tmp_path / "out"}
        arguments = {**defaults, "dataset_id": dataset_id, "device": "cpu", **options}
        pairs = [part for name, value in arguments.items() if value is not None for part in (f"--{name}", str(value))]
        return extract_logits.main([*pairs, *flags])

    return run


def test_what_cannot_be_extracted_is_skipped_and_counted(extract, chat_file, tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi " * 80}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "Yo"}, {"role": "assistant", "content": "Hello again"}]},
    ]
    assert extract(chat_file(rows), max_length=90) == 0
    summary = capsys.readouterr().out
    assert "2 written, 3 skipped" in summary
    for reason in ("no assistant turn", "longer than 90 tokens", "no token to extract: the assistant mask is empty"):
        assert f"1 × {reason}" in summary
    dataset = open_dataset(str(tmp_path / "out"))
    assert [dataset.read_row(i)["source_index"] for i in range(2)] == [0, 4]
    (shard,) = (tmp_path / "out").glob("data/*/*.parquet")
    recorded = json.loads(pq.ParquetFile(shard).metadata.metadata[b"logit_extraction"])
    assert [entry["row"] for entry in recorded["skipped"]] == [1, 2, 3]
    assert (recorded["first_row"], recorded["end_row"], recorded["num_rows"]) == (0, 5, 2)


def test_conversations_longer_than_the_models_positions_are_skipped(extract, chat_file, tmp_path, capsys):
    model = make_tiny_model(tmp_path / "short", vocab_size=49_152, max_position_embeddings=48)
    assert extract(chat_file([GOOD, {**GOOD, "question": "why " * 40}]), model_id=model) == 0
    assert "1 × longer than 48 tokens" in capsys.readouterr().out


def test_a_run_without_draws_is_told_at_once_what_its_rows_are_not_for(extract, chat_file, tmp_path, capsys):
    assert extract(chat_file([GOOD])) == 0 and "biased" not in capsys.readouterr().err
    assert extract(chat_file([GOOD]), num_sampled=0, output_dir=tmp_path / "without") == 0
    told = capsys.readouterr().err
    assert told.index("--num_sampled 0: no tail tokens are sampled") < told.index("Looking for the model")


def test_ids_beyond_17_bits_survive(extract, tiny_model, chat_file, tmp_path):
    """With 262,144 rows, against the distributions of a plain forward."""
    import torch
    from transformers import AutoModelForCausalLM

    assert extract(chat_file([GOOD]), model_id=tiny_model, top_k=8, num_sampled=8) == 0
    dataset = open_dataset(str(tmp_path / "out"))
    row = dataset.read_row(0)
    from chat_logits.data.row_alignment import align_row
    from chat_logits.data.tokenizer import load_tokenizer

    aligned = align_row(row, load_tokenizer(str(tiny_model)), dataset.manifest)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.inference_mode():
        log_probs = model(torch.from_numpy(aligned.input_ids)[None]).logits[0].double().log_softmax(-1).numpy()
    seen = []
    for index, position in enumerate(aligned.positions):
        found = logit_codec.dequantize_all_logits(row, index)
        nucleus = found.token_ids[~found.is_sampled]
        assert nucleus.tolist() == logit_codec.select_nucleus(log_probs[position - 1], 8, 0.98).tolist()
        exact = np.exp(log_probs[position - 1][found.token_ids])
        np.testing.assert_allclose(np.exp(found.log_probs), exact, rtol=0.25, atol=1e-13)
        seen += found.token_ids.tolist()
    assert max(seen) > 131_072 and min(seen) < 65_536
    assert any(65_536 <= token < 131_072 for token in seen)


def test_several_shards_cover_fixed_ranges(extract, chat_file, tmp_path):
    rows = [{"question": f"Number {i}?", "answer": f"It is {i}."} for i in range(8)]
    assert extract(chat_file(rows), rows_per_shard=3) == 0
    dataset = open_dataset(str(tmp_path / "out"))
    assert [shard.num_rows for shard in dataset.shards] == [3, 3, 2]
    assert [dataset.read_row(i)["source_index"] for i in range(8)] == list(range(8))
    assert dataset.read_row(-1)["messages"][1]["content"] == "It is 7."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "question,answer\nHi,Hello there\n"),
        ("a.json", json.dumps([{"prompt": "Hi", "completion": "Hello there"}])),
        ("a.jsonl", json.dumps({"query": "Hi", "response": "Hello there"})),
    ],
)
def test_files_of_every_kind_are_read(extract, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert extract(tmp_path / name) == 0
    row = open_dataset(str(tmp_path / "out")).read_row(0)
    assert [(m["role"], m["content"]) for m in row["messages"]] == [("user", "Hi"), ("assistant", "Hello there")]


def test_a_folder_and_another_split_are_read(extract, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "Hello there"}))
    assert extract(folder, split="test") == 0
    out = tmp_path / "out"
    assert open_dataset(str(out)).read_row(0)["messages"][0]["content"] == "test"
    assert (out / "data/00000/test-00000.parquet").is_file()
    assert "split: test" in (out / "README.md").read_text()


def test_a_template_may_be_given_as_text(extract, chat_file, tmp_path):
    text = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    assert extract(chat_file([GOOD]), chat_template=text) == 0
    assert open_dataset(str(tmp_path / "out")).manifest.chat_template == text


def test_the_seed_changes_the_draws_alone(extract, chat_file, tmp_path):
    rows = []
    for seed in (0, 0, 1):
        assert extract(chat_file([GOOD]), "--overwrite", seed=seed) == 0
        rows.append(open_dataset(str(tmp_path / "out")).read_row(0))
    assert rows[0] == rows[1] != rows[2]
    changed = {key for key in rows[0] if rows[0][key] != rows[2][key]}
    assert changed <= {"sampled_logits_quantized", "sampled_indices_low", "sampled_indices_high", "mean_entropy"}


# --- refusals ---


def refused(capsys) -> str:
    """The error's message, which is one or two lines and no traceback."""
    message = capsys.readouterr().err.split("error: ")[-1].strip()
    assert "Traceback" not in message and len(message.splitlines()) <= 2
    return message


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"top_p": 0}, 2, "--top_p 0.0: expected a number above 0 and up to 1"),
        ({"top_p": 1.5}, 2, "--top_p 1.5"),
        ({"top_k": 0}, 2, "--top_k 0: expected 1 or more"),
        ({"num_sampled": -1}, 2, "--num_sampled -1: expected 0 or more"),
        ({"seed": -1}, 2, "--seed -1"),
        ({"batch_tokens": 0}, 2, "--batch_tokens 0"),
        ({"logit_memory": -5}, 2, "--logit_memory -5: expected 1 or more"),
        ({"device": "cuda:9"}, 2, "--device cuda:9"),
        ({"output_dir": None}, 2, "nowhere to write: give --output_repo USER/NAME, --output_dir FOLDER"),
        ({"chat_template": "{{ messages[-1].content }}"}, 2, "renders differently alone"),
        ({"chat_template": "{{ messages | length }}"}, 2, "Three ways out"),
        ({"chat_template": "no/such.jinja"}, 2, "--chat_template no/such.jinja: no such file"),
        ({"chat_template": "{% for %}"}, 2, "chat template, line 1"),
        ({"chat_template": "{{ raise_exception('not me') }}{% generation %}{% endgeneration %}"}, 1, "not me"),
        ({"chat_template": "{{ messages }}{% generation %}{% endgeneration %}"}, 1, "the assistant mask is empty"),
        ({"model_id": "/no/such/model"}, 2, "/no/such/model"),
        ({"attn_implementation": "nonsense"}, 1, "nonsense"),
        ({"split": "nowhere[:3]"}, 2, "--max_samples"),
        ({"split": "a/b"}, 2, "--split a/b: expected a split's name"),
        ({"output_repo": "a/b/c"}, 2, "--output_repo a/b/c: expected USER/NAME"),
        ({"output_repo": "user/"}, 2, "--output_repo user/: expected USER/NAME"),
        ({"output_dir": "/proc/version/x"}, 2, "/proc/version is not a folder that can be written to"),
        ({"model_revision": "main"}, 2, "--model_revision main: .* is local"),
        ({"dataset_revision": "main"}, 2, "--dataset_revision main: .* is local"),
        ({"top_k": 1_000_000}, 2, "--top_k 1000000: the model has 49152 tokens"),
        ({"device": "meta"}, 2, "--device meta"),
        ({"model_id": "some/file.gguf"}, 2, "--gguf_file file.gguf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_options_are_refused(extract, chat_file, tmp_path, capsys, options, status, words):
    assert extract(chat_file([GOOD]), **options) == status
    assert re.search(words if ".*" in words else re.escape(words), refused(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "status", "words"),
    [
        ([{"text": "a", "label": 1}], 2, "no chat columns among: text, label"),
        (
            [{**GOOD, "prompt": "a", "completion": "b"}],
            2,
            "ambiguous columns: question + answer and prompt",
        ),
        ([], 2, "no rows"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}] * 3, 1, "first 3 conversations (3 × no assistant turn)"),
    ],
)
def test_datasets_without_conversations_are_refused(extract, chat_file, tmp_path, capsys, rows, status, words):
    assert extract(chat_file(rows)) == status
    assert words in refused(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "notes.txt"])
def test_missing_or_strange_datasets_are_refused(extract, tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert extract(name) == 2
    assert name.removeprefix("./") in refused(capsys)


def test_a_model_that_rules_the_answers_out_has_an_infinite_perplexity(extract, chat_file, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "sure", vocab_size=49_152)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20_000)
    model.save_pretrained(folder)
    assert extract(chat_file([GOOD]), model_id=folder) == 0
    printed = capsys.readouterr().out
    nll = float(re.search(r"mean NLL ([\d.]+) nats, perplexity inf", printed)[1])
    row = open_dataset(str(tmp_path / "out")).read_row(0)
    assert nll == pytest.approx(-np.mean(row["token_log_probs"]), abs=1e-3) and nll > 709


def test_a_folder_that_holds_another_run_is_kept(extract, chat_file, tmp_path, capsys):
    assert extract(chat_file([GOOD])) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert extract(chat_file([GOOD]), top_k=8) == 2
    assert "holds another run (top_k: 64 there, 8 here)" in refused(capsys)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert extract(chat_file([GOOD]), "--overwrite", top_k=8) == 0
    assert open_dataset(str(tmp_path / "out")).manifest.top_k == 8


def test_datasets_does_not_take_a_folder_for_its_cached_elder(extract, chat_file, tmp_path):
    """It goes by the folder's name and the card's configs alone: same name, other rows."""
    for answer in ("Paris.", "Lutetia, once."):
        assert extract(chat_file([{**GOOD, "answer": answer}]), "--overwrite") == 0
        (row,) = datasets.load_dataset(str(tmp_path / "out"), split="train")
        assert row["messages"][1]["content"] == answer


def test_a_source_folder_that_has_changed_is_read_anew(extract, tmp_path):
    """The same trap on the other side: a folder with a card, written again."""
    folder = tmp_path / "source"
    folder.mkdir()
    card = "---\nconfigs:\n- config_name: default\n  data_files: data.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    for answer in ("Paris.", "Lutetia, once."):
        (folder / "data.jsonl").write_text(json.dumps({**GOOD, "answer": answer}))
        assert extract(folder, "--overwrite") == 0
        assert open_dataset(str(tmp_path / "out")).read_row(0)["messages"][1]["content"] == answer


def test_one_bad_row_does_not_end_the_run(extract, chat_file, tmp_path, capsys):
    model = make_tiny_model(tmp_path / "narrow", vocab_size=49_151)
    rows = [{**GOOD, "question": text} for text in ("fine", "divide", "fine")]
    template = TEMPLATE.read_text(encoding="utf-8") + "{{ 1 / 0 if messages[0].content == 'divide' }}"
    assert extract(chat_file(rows), model_id=model, chat_template=template) == 0
    summary = capsys.readouterr().out
    assert "2 written, 1 skipped" in summary and "refuses it: division by zero" in summary


def test_tokens_beyond_the_embedding_are_skipped_before_the_model(extract, chat_file, tmp_path, capsys):
    model = make_tiny_model(tmp_path / "added", vocab_size=49_152)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    assert extract(chat_file([GOOD, {**GOOD, "answer": "an <extra> token"}]), model_id=model) == 0
    assert "1 × a token beyond the model's 49152 embeddings" in capsys.readouterr().out


def test_a_folder_with_other_files_is_never_written_to(extract, chat_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert extract(chat_file([GOOD]), "--overwrite") == 2
    assert "holds other files, such as thesis.tex" in refused(capsys)


def test_a_tokenizer_with_wide_ordinary_ids_is_refused(extract, chat_file, tmp_path, capsys):
    model = make_tiny_model(tmp_path / "wide")
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["wide"] = 2**18
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert extract(chat_file([GOOD]), model_id=model) == 2
    assert "ordinary tokens up to id 262144, expected ids below 262144" in refused(capsys)


def test_a_model_with_more_ids_than_can_be_stored_says_which_are_not(extract, chat_file, tmp_path, capsys):
    """None of them is a token: what stands there is padding, or special tokens of other kinds of input."""
    model = make_tiny_model(tmp_path / "padded", vocab_size=2**18 + 64)
    assert extract(chat_file([GOOD]), model_id=model) == 0
    told = "Token ids from 262,144 on (of 262,208) cannot be stored"
    assert told in capsys.readouterr().err


def test_a_token_is_skipped_or_kept(extract, chat_file, capsys):
    assert extract(chat_file([GOOD]), "--skip_tokens", "<|im_end|>", "--keep_tokens", "<|im_end|>") == 2
    assert "--skip_tokens, --keep_tokens: both have '<|im_end|>', expected it in one of them" in refused(capsys)


@pytest.mark.parametrize("text", ["[1]", "{", '{"messages": []}'])
def test_template_kwargs_are_a_json_object(extract, chat_file, capsys, text):
    assert extract(chat_file([GOOD]), template_kwargs=text) == 2
    assert re.search(r"^--template_kwargs.*: expected a JSON object", refused(capsys))


def test_dtypes_are_listed(extract, chat_file, capsys):
    assert extract(chat_file([GOOD]), dtype="float8") == 2
    assert "--dtype float8: expected one of auto, float32, bfloat16, float16" in refused(capsys)
