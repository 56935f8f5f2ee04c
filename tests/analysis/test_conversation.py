"""The analysis object against reference forward passes and worked numbers, and each form that it takes."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import MODEL, TEMPLATE, run_command

import explore_logits
import extract_logits
import logit_codec
from chat_logits.analysis.row import token_statistics
from chat_logits.analysis.tokens import PROMPT
from chat_logits.errors import UsageError
from explore_logits import execute_analysis
from logit_codec import Distributions, encode_rows


@pytest.fixture(scope="module")
def analyses(real_extraction):
    return [execute_analysis(str(real_extraction), i, quiet=True) for i in range(32)]


@pytest.fixture(scope="module")
def true_entropies(analyses, smollm2):
    """Of every extracted token's predicting distribution, by reference forward passes over the whole vocabulary."""
    found = []
    for analysis in analyses:
        with torch.inference_mode():
            logits = smollm2[0](torch.tensor([[token.token_id for token in analysis]])).logits[0].double()
        log_probs = logits.log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1).numpy()
        found.extend(entropies[token.position - 1] for token in analysis if token.is_extracted)
    return np.array(found)


def test_entropy_is_the_models_without_bias(analyses, true_entropies):
    found = np.array([token.entropy for analysis in analyses for token in analysis if token.is_extracted])
    errors = found - true_entropies
    standard_error = errors.std() / math.sqrt(len(errors))
    assert abs(errors.mean()) < 4 * standard_error + 0.002
    assert np.abs(errors).mean() < 0.06 and np.abs(errors).max() < 1


def test_worked_numbers_of_a_position():
    """p = 1/2, 1/4 and a tail of 1/4 in two draws of 1/8: 1/2 ln 2 + 1/4 ln 4 + 1/4 ln 8 nats."""
    distribution = Distributions(
        top_ids=np.array([[7, 3, logit_codec.ABSENT]]),
        top_probs=np.array([[0.5, 0.25, 0.0]]),
        sampled_ids=np.array([[1, 2]]),
        sampled_probs=np.array([[0.125, 0.125]]),
        logsumexp=np.array([0.0]),
        token_log_probs=np.log([0.25]),
    )
    row = encode_rows(distribution, [1], np.array([3]))[0]
    numbers = token_statistics(row, np.array([3]))
    assert numbers.ranks.tolist() == [2] and numbers.kept.tolist() == [2]
    assert numbers.tail_mass[0] == pytest.approx(0.25, abs=0.005)
    assert numbers.entropies[0] == pytest.approx(1.75 * math.log(2), abs=0.01)
    assert token_statistics(row, np.array([1])).ranks.tolist() == [0]  # drawn from the tail is not in the nucleus
    assert token_statistics(row, np.array([0])).ranks.tolist() == [0]  # an absent entry's id is no entry


def test_totals_are_the_tokens(analyses):
    for analysis in analyses[:4]:
        extracted = [token for token in analysis if token.is_extracted]
        totals = analysis.totals
        mean = sum(token.surprisal for token in extracted) / len(extracted)
        assert totals.perplexity == pytest.approx(math.exp(mean))
        assert totals.top1_rate == sum(token.rank == 1 for token in extracted) / len(extracted)
        assert totals.mean_entropy == pytest.approx(sum(token.entropy for token in extracted) / len(extracted))
        assert totals.stored == pytest.approx(1 - sum(token.tail_mass for token in extracted) / len(extracted))


def test_only_and_show_prompt_choose_in_every_form(analyses):
    analysis = analyses[2]
    surprising = analysis.showing(only=7)
    expected = sorted((t for t in analysis if t.is_extracted), key=lambda t: -t.surprisal)[:7]
    assert [found["position"] for found in surprising.to_dicts()] == [token.position for token in expected]
    assert len(str(surprising).splitlines()) == 4 + 7 + 1
    unstored = analysis.showing(only=lambda token: token.rank is None)
    assert [found["rank"] for found in unstored.to_dicts()] == [None] * sum(
        t.is_extracted and not t.rank for t in analysis
    )
    without = analysis.showing(show_prompt=False).to_dicts()
    assert len(without) == len(analysis) - sum(token.status == PROMPT for token in analysis)
    assert len(analysis.to_dicts()) == len(analysis) == len(analysis.tokens)


def test_what_is_shown_can_be_chosen_again_in_steps(analyses, real_extraction):
    analysis = analyses[2].showing(show_prompt=False).showing(only=3).showing(top_n=2)
    assert (analysis.show_prompt, analysis.only, analysis.top_n) == (False, 3, 2)
    assert [len(token.predictions) for token in analysis.shown] == [2, 2, 2]
    assert len(analyses[2].showing(only=3).showing(only=None).shown) == len(analyses[2])
    for wrong in ({"only": 0}, {"only": -3}, {"top_n": 0}, {"top_n": 6}):
        with pytest.raises(UsageError, match=r"expected 1 or more|5 predictions a token are at hand"):
            analyses[2].showing(**wrong)
    given_as_path = execute_analysis(real_extraction, quiet=True)
    assert json.loads(given_as_path.to_json())["logit_dataset_id"] == str(real_extraction)
    assert repr(given_as_path) == f"<Analysis of row 0 of {real_extraction}: {len(given_as_path)} tokens>"


def test_without_draws_an_entropy_is_told_as_a_lower_bound(small_model, chat_file, tmp_path):
    source = chat_file([{"question": "What is it?", "answer": "It is a bound."}])
    flags = ["--model_id", small_model, "--dataset_id", source, "--output_dir", tmp_path / "out", "--num_sampled", 0]
    assert extract_logits.main([*map(str, flags), "--chat_template", str(TEMPLATE)]) == 0
    analysis = execute_analysis(str(tmp_path / "out"), quiet=True)
    assert analysis.totals.entropy_is_bound and all(t.entropy_is_bound for t in analysis if t.is_extracted)
    assert f"mean entropy ≥ {analysis.totals.mean_entropy:.2f} nats" in str(analysis)
    assert sum("  ≥" in line for line in str(analysis).splitlines()) == analysis.totals.num_tokens
    assert "≥ " in analysis.to_html() and json.loads(analysis.to_json())["totals"]["entropy_is_bound"]


def test_a_relative_model_is_found_from_the_datasets_folder(real_extraction, tmp_path, monkeypatch):
    """As `make demo` records it, looked at from elsewhere."""
    moved = shutil.copytree(real_extraction, tmp_path / "outputs" / "demo")
    extraction = json.loads((moved / "extraction.json").read_text(encoding="utf-8"))
    (moved / "extraction.json").write_text(json.dumps({**extraction, "model_id": "models/smollm2"}), encoding="utf-8")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(MODEL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(execute_analysis("../outputs/demo", quiet=True)) > 50


def test_a_frame_and_json_have_what_the_tokens_have(analyses):
    analysis = analyses[2]
    frame = analysis.to_frame()
    assert len(frame) == len(analysis)
    extracted = frame[frame.status == "extracted"]
    assert math.exp(extracted.surprisal.mean()) == pytest.approx(analysis.totals.perplexity)
    content = json.loads(analysis.to_json())
    assert content["totals"]["num_tokens"] == len(extracted)
    assert [token["token_id"] for token in content["tokens"]] == [token.token_id for token in analysis]
    best = next(token for token in analysis if token.is_extracted).predictions[0]
    told = next(token for token in content["tokens"] if token["status"] == "extracted")["predictions"][0]
    assert told == {"token_id": best.token_id, "text": best.text, "probability": best.probability}


def test_printed_it_is_the_table(real_extraction, analyses, capsys):
    execute_analysis(str(real_extraction), 2)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith(f"Detailed Token Analysis: row 2 of {real_extraction}, model ")
    assert str(analyses[2]) == printed.rstrip("\n")


def test_the_command_writes_page_and_json(real_extraction, tmp_path, analyses):
    page, content = tmp_path / "page.html", tmp_path / "row.json"
    done = run_command(
        "explore_logits.py",
        *("--logit_dataset_id", real_extraction, "--sample_index", 2, "--html", page, "--json", content),
    )
    assert done.returncode == 0 and f"Wrote {page}" in done.stderr and f"Wrote {content}" in done.stderr
    assert page.read_text(encoding="utf-8") == analyses[2].to_html()
    assert content.read_text(encoding="utf-8") == analyses[2].to_json()


def test_json_on_standard_output_is_that_alone(real_extraction, capsys, analyses):
    assert (
        explore_logits.main(["--logit_dataset_id", str(real_extraction), "--sample_index", "-30", "--json", "-"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == json.loads(analyses[2].to_json())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--html", "/no/such/folder/page.html"],
            "page.html: the folder /no/such/folder is missing",
        ),
        (["--json", "/tmp"], "--json /tmp: not the name of a file, expected a file to write"),
        (["--surprising", "0"], "--surprising 0: expected 1 or more"),
    ],
)
def test_wrong_places_are_told_before_any_work(real_extraction, capsys, options, words):
    assert explore_logits.main(["--logit_dataset_id", str(real_extraction), *options]) == 2
    assert words in capsys.readouterr().err
