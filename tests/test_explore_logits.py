"""The analysis of a real row against reference forward passes, and the exploration command."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import MODEL, REPO, TEMPLATE, make_tiny_model, run_command

import explore_logits
from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED
from chat_logits.data.row_alignment import AlignmentError
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import open_dataset
from explore_logits import analyze_token_probabilities, execute_analysis, execute_comparison, unpack_indices


@pytest.fixture(scope="module")
def analysis(real_extraction):
    return execute_analysis(str(real_extraction), sample_index=2)


def test_every_token_of_the_conversation_is_there_once(analysis, smollm2, source_rows):
    question, answer = (turn["value"] for turn in source_rows[2]["conversations"])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids = smollm2[1].apply_chat_template(messages, return_dict=True)["input_ids"]
    assert [token.token_id for token in analysis] == ids
    assert "".join(token.text for token in analysis if token.status == EXTRACTED) == answer
    assert [token.text for token in analysis if token.status == SKIPPED] == ["<|im_end|>"]


def test_predictions_are_what_the_model_says_there(analysis, smollm2):
    """Against a reference forward pass: the predictions beside a token are the model's before it has seen it."""
    model, tokenizer = smollm2
    with torch.inference_mode():
        logits = model(torch.tensor([[token.token_id for token in analysis]])).logits[0].double()
    probabilities = logits.softmax(-1).numpy()
    for token in analysis:
        if token.status != EXTRACTED:
            continue
        expected = probabilities[token.position - 1]
        top = np.argsort(-expected)[:5]
        assert [prediction.token_id for prediction in token.predictions] == top[: len(token.predictions)].tolist()
        for prediction in token.predictions:
            assert prediction.probability == pytest.approx(expected[prediction.token_id], abs=0.01)
            assert prediction.text.encode(errors="surrogateescape").decode(errors="replace") == tokenizer.decode(
                [prediction.token_id]
            )
        assert token.log_prob == pytest.approx(np.log(expected[token.token_id]), abs=1e-4)
        rank = int((expected > expected[token.token_id]).sum()) + 1
        assert token.rank == (rank if rank <= token.kept else None)


def test_the_command_prints_the_table(real_extraction, source_rows):
    done = run_command("explore_logits.py", "--logit_dataset_id", real_extraction, "--sample_index", 2, "--top_n", 3)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Detailed Token Analysis: row 2 of {real_extraction}, model ")
    assert lines[2].startswith("Real Token                     | Extracted Predictions (Top 3)")
    rows = [line for line in lines[4:-1] if "(prompt)" not in line and "(skipped" not in line]
    shown = "".join(json.loads(line.split(" | ")[0].strip()) for line in rows).replace("␣", " ")
    assert shown == source_rows[2]["conversations"][1]["value"]
    assert all(1 <= line.count("(0.") + line.count("(1.") <= 3 for line in rows)


HEAVY = ("torch", "pandas", "transformers", "datasets", "huggingface_hub")


def test_one_row_of_a_local_dataset_is_shown_without_what_is_heavy(real_extraction):
    """Neither in time nor in memory: 250 MB at most."""
    code = (
        "import sys, explore_logits\n"
        "status = explore_logits.main(['--logit_dataset_id', sys.argv[1], '--sample_index', '2'])\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(status, heavy, int(peak) // 1024, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, real_extraction], capture_output=True, text=True, cwd=REPO)
    *result, megabytes = done.stderr.split()
    assert result == ["0", "[]"] and int(megabytes) < 250
    assert done.stdout.startswith("Detailed Token Analysis:")


@pytest.mark.parametrize(
    "given", [["/no/such/folder"], ["{}", "--tokenizer_id", "/no/such/model"], ["{}", "--compare", "/no"]]
)
def test_what_is_missing_is_noticed_before_anything_heavy_is_imported(real_extraction, given):
    code = (
        "import sys, explore_logits\n"
        "status = explore_logits.main(['--logit_dataset_id', *sys.argv[1:]])\n"
        "print(status, [name for name in ('torch', 'pandas') if name in sys.modules])"
    )
    options = [part.format(real_extraction) for part in given]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=REPO)
    assert done.stdout == "2 []\n" and re.search("no such (file or )?folder", done.stderr)


@pytest.mark.parametrize("given", [str(TEMPLATE), TEMPLATE.read_text(encoding="utf-8")])
def test_the_template_may_be_given_again(real_extraction, given):
    assert len(execute_analysis(str(real_extraction), 0, chat_template=given)) > 50


def test_another_template_is_refused_with_the_first_difference(real_extraction):
    other = TEMPLATE.read_text(encoding="utf-8").replace("helpful AI", "unhelpful AI")
    with pytest.raises(AlignmentError, match=r"does not fit the extraction: token \d+ is .*, expected ' helpful'"):
        execute_analysis(str(real_extraction), 0, chat_template=other)


def test_a_row_that_was_changed_is_refused(real_extraction, smollm2):
    dataset = open_dataset(str(real_extraction))
    row = dataset.read_row(0)
    for change in ({"alignment_checksum": 1}, {"messages": dataset.read_row(1)["messages"]}):
        with pytest.raises(AlignmentError, match="column alignment_checksum"):
            analyze_token_probabilities({**row, **change}, smollm2[1], dataset.manifest)


def test_a_model_that_has_moved_is_found_by_tokenizer_id(real_extraction, tmp_path, capsys):
    moved = shutil.copytree(real_extraction, tmp_path / "moved")
    extraction = json.loads((moved / "extraction.json").read_text())
    extraction["model_id"] = str(tmp_path / "gone")
    (moved / "extraction.json").write_text(json.dumps(extraction))
    assert explore_logits.main(["--logit_dataset_id", str(moved)]) == 1
    assert "which is not here. Say where it lies now: --tokenizer_id FOLDER" in capsys.readouterr().err
    assert explore_logits.main(["--logit_dataset_id", str(moved), "--tokenizer_id", str(MODEL)]) == 0


def test_another_tokenizer_is_refused(real_extraction, tmp_path):
    model = make_tiny_model(tmp_path / "other", vocab_size=49_152)
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ToolkitError, match=r"fingerprint .*, expected .*; it is not the tokenizer"):
        execute_analysis(str(real_extraction), 0, tokenizer_id=str(model))


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--sample_index", "32"], 2, "has 32 rows, 0 to 31"),
        (["--chat_template", "missing.jinja"], 2, "no such file"),
        (["--logit_dataset_id", "/no/such/folder"], 2, "/no/such/folder: no such folder"),
        (["--top_n", "0"], 2, "--top_n 0: expected 1 or more"),
    ],
)
def test_wrong_use_ends_in_a_line(real_extraction, capsys, options, status, words):
    assert explore_logits.main(["--logit_dataset_id", str(real_extraction), *options]) == status
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


@pytest.mark.parametrize("wrong", ["3", 0, 2.0, True, None])
def test_numbers_from_python_are_checked_as_those_of_the_command(real_extraction, wrong):
    message = re.escape(f"`top_n` {wrong!r}: expected a whole number, 1 or more")
    with pytest.raises(UsageError, match=message):
        execute_analysis(str(real_extraction), top_n=wrong)
    if wrong is not None:
        with pytest.raises(UsageError, match=message):
            execute_comparison(str(real_extraction), str(real_extraction), 0, top_n=wrong)
        with pytest.raises(UsageError, match=message.replace("top_n", "only")):
            execute_analysis(str(real_extraction), only=wrong)
    found = execute_analysis(str(real_extraction), top_n=np.int64(2), quiet=True)
    assert max(len(token.predictions) for token in found) == 2


@pytest.mark.parametrize("wrong", ["0", 1.5, True, None, "x"])
def test_rows_from_python_are_whole_numbers(real_extraction, wrong):
    message = re.escape(f"`sample_index` {wrong!r}: expected a whole number, negative from the end")
    with pytest.raises(UsageError, match=message):
        execute_analysis(str(real_extraction), wrong)
    if wrong is not None:
        with pytest.raises(UsageError, match=message):
            execute_comparison(str(real_extraction), str(real_extraction), wrong)
    assert execute_analysis(str(real_extraction), np.int64(-1), quiet=True).sample_index == 31


@pytest.mark.parametrize("wrong", ["3", 0, -1, 2.0, True])
def test_counts_from_python_are_checked_before_a_model_is_loaded(real_extraction, wrong):
    """The student is not there, which would be told next."""
    place = str(real_extraction)
    for name, call in {
        "budget_rows": lambda: explore_logits.execute_budget(place, wrong),
        "student_rows": lambda: explore_logits.execute_student(place, "/no/such", student_rows=wrong),
        "verify": lambda: explore_logits.execute_verification(place, wrong, model_id="/no/such"),
    }.items():
        with pytest.raises(UsageError, match=re.escape(f"`{name}` {wrong!r}: expected a whole number, 1 or more")):
            call()


@pytest.mark.parametrize(
    ("thin", "message"),
    [
        ((8.5, 8, 0.9, "thin"), "`thin`: K 8.5: expected a whole number"),
        ((True, 8, 0.9, "thin"), "`thin`: K True: expected a whole number"),
        ((8, 2.5, 0.9, "thin"), "`thin`: S 2.5: expected a whole number"),
        ((8, 8, 0.9, None), "`thin` None: no name; expected"),
    ],
)
def test_settings_from_python_are_whole_numbers(real_extraction, tmp_path, monkeypatch, thin, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(message)):
        explore_logits.execute_thinning(str(real_extraction), thin)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(real_extraction, capsys):
    assert explore_logits.main(["--logit_dataset_id", str(real_extraction), "--sample_index", "99", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error(real_extraction):
    command = f"{sys.executable} {REPO}/explore_logits.py --logit_dataset_id {real_extraction} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Detailed Token Analysis: row 0 of ") and done.stdout.count("\n") == 1


def test_a_terminal_without_the_characters_shows_their_codes(real_extraction):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run_command("explore_logits.py", "--logit_dataset_id", real_extraction, env=env)
    assert done.returncode == 0 and '"\\u2423by"' in done.stdout


def test_helpers_are_passed_on(real_extraction):
    row = open_dataset(str(real_extraction)).read_row(0)
    ids = unpack_indices(row["top_indices_low"], row["top_indices_high"])
    position = explore_logits.dequantize_all_logits(row, 0)
    assert ids[: position.token_ids.size][0] == position.token_ids[0]
    assert position.weights.sum() == pytest.approx(1, abs=1e-9)


def test_prompt_tokens_carry_no_numbers(analysis):
    assert all(token.log_prob is None and not token.predictions for token in analysis if token.status == PROMPT)
