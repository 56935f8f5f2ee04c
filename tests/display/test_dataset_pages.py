"""The pages of whole datasets and of comparisons in a real browser: what they show is what was found."""

import json
import re

import pytest
from conftest import PHONE, WIDE
from test_token_page import HOSTILE, token

from explore_logits import execute_comparison, execute_summary, main


@pytest.fixture(scope="module")
def summary(real_extraction):
    return execute_summary(str(real_extraction), quiet=True)


@pytest.fixture(scope="module")
def comparison(real_extraction, other_extraction):
    return execute_comparison(str(real_extraction), str(other_extraction), 2, quiet=True)


def texts(page, selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def test_a_summarys_pictures_are_its_numbers(opened, summary):
    page = opened(summary)
    tiles = dict(zip(texts(page, ".tiles dt"), texts(page, ".tiles dd"), strict=True))
    assert tiles["Perplexity"] == f"{summary.perplexity:.2f}" and tiles["Tokens"] == f"{summary.num_tokens:,}"
    for title, found in (("Surprisal", summary.surprisals), ("Entropy", summary.entropies)):
        figure = page.locator(".figure.histogram", has_text=title)
        heights = figure.locator(".bins i").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().height)")
        expected = [count / max(found.counts) * max(heights) for count in found.counts]
        assert heights == pytest.approx(expected, abs=1)
    places = "all => all.flatMap(one => [one.getAttribute('cx'), one.getAttribute('cy')].map(Number))"
    present = [one for one in summary.calibration if one.count]
    expected = [number for one in present for number in (100 * one.confidence, 100 - 100 * one.accuracy)]
    assert page.locator(".reliability circle").evaluate_all(places) == pytest.approx(expected, abs=0.01)
    rows = page.locator(".figure.table", has_text="largest loss").first.locator("tbody tr")
    assert rows.count() == len(summary.largest_losses)
    assert f"{summary.largest_losses[0].log_prob:.2f}" in rows.first.inner_text()
    kept = page.locator(".figure.bars", has_text="entries kept").locator(".prediction")
    assert kept.last.inner_text().split() == ["64", f"{summary.kept.counts[64] / summary.num_tokens:.1%}"]
    sizes = page.locator(".figure.bars", has_text="Bytes").locator(".number").all_inner_texts()
    assert sum(map(float, sizes)) == pytest.approx(summary.bytes_per_token, abs=0.1)
    assert not page.complaints and [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE])
def test_no_page_is_wider_than_the_window(opened, summary, comparison, viewport, scheme):
    for found in (summary, comparison):
        page = opened(found, viewport, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_a_comparison_shows_both_models_predictions(opened, comparison):
    page = opened(comparison)
    extracted = [pair for pair in comparison if pair.is_extracted]
    assert page.locator("#text .assistant [data-i].t:not(.skipped)").count() == len(extracted)
    furthest = max(extracted, key=lambda pair: pair.kl)
    page.locator("#listed a").first.click()
    panel = page.locator("#panel")
    assert f"{furthest.kl:.4f} nats" in panel.inner_text()
    assert texts(page, "#panel h4") == [comparison.first.model_id, comparison.other.model_id]
    names = [name.strip('"') for name in texts(page, ".prediction:not(.rest) span:first-child")]
    for side in (furthest.first, furthest.other):
        assert {p.text.replace(" ", "␣") for p in side.predictions} <= set(names)
    differing = {pair.first.position for pair in extracted if not pair.agrees}
    marked = page.locator("#text .second").evaluate_all("all => all.map(e => Number(e.dataset.i))")
    assert set(marked) == differing
    token(page, extracted[0].first.position).hover()  # another one is kept open
    assert f"Token {furthest.first.position}," in panel.inner_text()


def test_whole_datasets_beside_each_other(opened, real_extraction, other_extraction):
    found = execute_comparison(str(real_extraction), str(other_extraction), quiet=True)
    page = opened(found)
    assert f"{found.totals.mean_kl:.4f} nats" in page.locator(".tiles").inner_text()
    told = page.locator(".bins div").evaluate_all("bins => bins.map(bin => bin.title)")
    counts = [int(re.search(r": ([\d,]+) ", title)[1].replace(",", "")) for title in told]
    assert counts == found.histogram.counts and sum(counts) == found.totals.num_tokens
    assert page.locator(".figure tbody tr").count() == len(found.tokens) + len(found.conversations)


def test_a_dataset_cannot_act_in_its_summary(opened, hostile_extraction):
    page = opened(execute_summary(str(hostile_extraction), quiet=True))
    assert page.evaluate("document.ran") is None and not page.complaints
    assert page.locator("main :is(script, img, b)").count() == 0
    shown = page.locator("main").inner_text()
    assert HOSTILE[1] in shown and r"\x1b[31mred" in shown
    assert not set("\x1b\x07\u202e\u202c\u2066\u2069\u200f\u200b") & set(page.content())


@pytest.mark.parametrize("mode", [["--summary"], ["--compare"], ["--compare", "--sample_index", "2"]])
def test_the_command_gives_all_three_forms(real_extraction, other_extraction, tmp_path, capsys, mode):
    options = [part for word in mode for part in ([word, str(other_extraction)] if word == "--compare" else [word])]
    files = {"--html": tmp_path / "page.html", "--json": tmp_path / "found.json"}
    flags = [str(part) for pair in files.items() for part in pair]
    assert main(["--logit_dataset_id", str(real_extraction), *options, *flags]) == 0
    printed = capsys.readouterr().out
    content = json.loads(files["--json"].read_text(encoding="utf-8"))
    totals = content.get("totals", content)
    assert f"perplexity {totals['perplexity']:.2f}" in printed
    assert f"{totals['perplexity']:.2f}" in files["--html"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--verify", "1", "--html", "page.html"], "--verify does not go with --html"),
        (["--summary", "--sample_index", "0"], "--summary does not go with --sample_index"),
        (["--compare", "x", "--summary"], "--compare does not go with --summary"),
        (["--summary", "--top_n", "5"], "--summary does not go with --top_n"),
        (["--compare", "x", "--surprising", "3"], "--surprising with --compare is for one conversation"),
        (["--model_id", "x"], "--model_id is for --verify"),
        (["--compare_revision", "x"], "--compare_revision is for --compare"),
        (["--html", "-"], "--html -: no name of a file"),
        (["--html", "same", "--json", "same"], "--html and --json: both name same, expected two files"),
        (["--verify", "0"], "--verify 0: expected 1 or more"),
        (["--compare", "/no/such/folder"], "/no/such/folder: no such folder"),
    ],
)
def test_wrong_use_ends_in_a_line(real_extraction, capsys, options, words):
    assert main(["--logit_dataset_id", str(real_extraction), *options]) == 2
    assert words in capsys.readouterr().err


def test_verification_decides_the_exit_status(real_extraction, capsys):
    assert main(["--logit_dataset_id", str(real_extraction), "--verify", "2", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] and found["num_rows"] == 2 and found["figures"]["kl_mean"] < 1e-3
