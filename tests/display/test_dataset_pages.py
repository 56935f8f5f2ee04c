"""The pages of whole datasets and of comparisons in a real browser: what they show is what was found."""

import datetime
import json
import re
from dataclasses import replace

import pytest
from conftest import PHONE, WIDE
from test_token_page import HOSTILE, token

from chat_logits.analysis.runs import RunDifference
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


def test_a_summary_says_where_its_rows_come_from(opened, summary, real_extraction):
    run = json.loads((real_extraction / "extraction.json").read_text(encoding="utf-8"))
    page = opened(summary)
    told = dict(zip(texts(page, ".record dt"), texts(page, ".record dd"), strict=True))
    assert told["Model"] == f"{run['model_id']} at {run['model_revision'][:12]}…"
    assert told["Source"] == (
        f"{run['dataset_id']} · split train at {run['dataset_revision'][:12]}…, the first 32 rows, "
        "turns marked not to be trained on left out"
    )
    assert told["Stored"] == "top-k 64, top-p 0.98, 16 draws from the tail, seed 0"
    assert told["Computed in"] == f"{run['dtype']}, head {run['head_dtype']}, attention {run['attn_implementation']}"
    written = datetime.datetime.fromtimestamp((real_extraction / "extraction.json").stat().st_mtime, datetime.UTC)
    assert told["Written"] == f"{written:%Y-%m-%d %H:%M} UTC"
    on_the_hub = opened(replace(summary, run=replace(summary.run, written=None, revision="e" * 40)))
    assert dict(zip(texts(on_the_hub, ".record dt"), texts(on_the_hub, ".record dd"), strict=True))["Revision"] == (
        f"{'e' * 12}…"
    )


def test_histograms_have_axes_with_units(opened, summary):
    page = opened(summary)
    for title, axis, found in (
        ("Surprisal", "surprisal, nats", summary.surprisals),
        ("Entropy", "entropy, nats", summary.entropies),
    ):
        figure = page.locator(".figure.histogram", has_text=title)
        largest = max(found.counts) / sum(found.counts)
        assert figure.locator(".shares span").all_inner_texts() == [f"{largest:.1%}", f"{largest / 2:.1%}", "0%"]
        assert figure.locator(".axis").all_inner_texts() == ["share of the tokens", axis]
        ticks = [tick for tick in figure.locator(".ticks span").all_inner_texts() if tick]
        assert ticks == ["0", "2.5", "5", "7.5", "10+"]
        bars, top = figure.locator(".bins").bounding_box(), figure.locator(".shares span").first.bounding_box()
        assert top["y"] == pytest.approx(bars["y"], abs=8) and top["x"] + top["width"] <= bars["x"]


def test_on_a_phone_a_question_is_whole(opened, summary):
    page = opened(summary, PHONE)
    figure = page.locator(".figure.table", has_text="Least confident")
    for row, found in zip(figure.locator("tbody tr").all(), summary.least_confident, strict=True):
        question = row.locator("td[data-title=Question]")
        assert found.question in question.inner_text() and found.source_index == found.sample_index
        box = question.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        assert question.evaluate("e => e.scrollWidth <= e.clientWidth")
        assert row.locator("td").count() == 4  # not the source row, which is the row
    other = replace(summary, least_confident=[replace(each, source_index=90) for each in summary.least_confident])
    figure = opened(other).locator(".figure.table", has_text="Least confident")
    assert figure.locator("thead").inner_text().split("\t")[:2] == ["Row", "Source row"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, {"width": 900, "height": 800}, PHONE, {"width": 320, "height": 568}])
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
    assert page.locator("main a").count() == 0  # a file alone has no page of each conversation
    assert page.locator(".differences td code").all_inner_texts() == [each.key for each in found.differences]
    served = opened(found, source=found.to_html({"home": "/", "row": "/compare/{row}"}))
    links = [link.get_attribute("href") for link in served.locator("main a").all()]
    assert links[: len(found.tokens)] == [f"/compare/{each.sample_index}#t={each.index}" for each in found.tokens]
    assert links[len(found.tokens) :] == [f"/compare/{each.sample_index}" for each in found.conversations]
    for each in found.tokens[:3]:
        pairs = execute_comparison(str(real_extraction), str(other_extraction), each.sample_index, quiet=True)
        there = [pair for pair in pairs if pair.is_extracted][each.index]
        assert (there.first.position, there.kl) == (each.position, pytest.approx(each.kl))


def test_a_dataset_cannot_act_in_its_summary(opened, hostile_extraction):
    page = opened(execute_summary(str(hostile_extraction), quiet=True))
    assert page.evaluate("document.ran") is None and not page.complaints
    assert page.locator("main :is(script, img, b)").count() == 0
    shown = page.locator("main").inner_text()
    assert HOSTILE[1] in shown and r"\x1b[31mred" in shown
    assert not set("\x1b\x07\u202e\u202c\u2066\u2069\u200f\u200b") & set(page.content())


def test_what_a_run_records_cannot_act_in_a_comparison(opened, comparison):
    hostile = [RunDifference(f"key{text}", text, HOSTILE[1]) for text in HOSTILE]
    page = opened(replace(comparison, differences=hostile))
    page.locator(".differences summary").click()
    assert page.locator(".differences tbody tr").count() == len(HOSTILE)
    assert page.locator(".differences :is(script, img, svg)").count() == 0
    assert page.evaluate("document.ran") is None and not page.complaints
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
        (["--html", "-"], "--html -: not the name of a file"),
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
