"""The pages of comparisons across tokenizers in a real browser: what they show is what was found, and nothing acts."""

import json
import re

import numpy as np
import pytest
from conftest import PHONE, WIDE
from held_rows import HeldDataset
from hostile import HOSTILE
from other_tokenizers import TRIMMED, trained
from transformers import AutoTokenizer

from chat_logits.analysis.cross_sides import Side
from chat_logits.analysis.cross_tokenizer import compare_bits, compare_spans
from chat_logits.display.results import shown

PLAIN = TRIMMED.replace(" | trim", "").replace("role + ': '", "role + '\\n'")
ANSWER = "The wizard 🧙 says:\n\n  世界您好, e\u0301 " + " ".join(HOSTILE)


@pytest.fixture(scope="module")
def sides(source_rows, model_folder):
    texts = [turn["value"] for row in source_rows[:100] for turn in row["conversations"]]
    tokenizers = [AutoTokenizer.from_pretrained(model_folder), trained("byte-fallback", texts)]
    talks = [
        [{"role": "user", "content": f"Well?\n{HOSTILE[0]}"}, {"role": "assistant", "content": f"{ANSWER} {i}"}]
        for i in range(4)
    ]
    random = np.random.default_rng(3)
    held = [
        HeldDataset(name, tokenizer, template, talks, lambda count: -random.exponential(2, count))
        for name, tokenizer, template in zip(("<b>a</b>", "b"), tokenizers, (PLAIN, TRIMMED), strict=True)
    ]
    return [Side(each, each.tokenizer) for each in held]


@pytest.fixture(scope="module")
def model_folder():
    from conftest import MODEL

    return MODEL


@pytest.fixture(scope="module")
def conversation(sides):
    return shown(compare_spans(*sides, 1))


@pytest.fixture(scope="module")
def datasets(sides):
    return shown(compare_bits(*sides))


def test_spans_stand_in_the_conversation_with_both_models_tokens(opened, conversation):
    page = opened(conversation)
    compared = [span for span in conversation if span.reason is None]
    assert page.locator("#text .assistant [data-i].t:not(.skipped)").count() == len(compared)
    assert page.locator("#text .assistant .skipped[data-i]").count() == len(conversation) - len(compared)
    marked = page.locator("#text .second").count()
    assert marked == sum(span.difference > 0 for span in compared)
    page.locator("#listed a").first.click()
    furthest = max(compared, key=lambda span: abs(span.difference))
    panel = page.locator("#panel").inner_text()
    assert f"{furthest.bits:.2f} and {furthest.other_bits:.2f}" in panel and f"{furthest.difference:+.2f} bits" in panel
    titles = page.locator("#panel h4").all_inner_texts()
    assert titles == [conversation.first.model_id, conversation.other.model_id]
    assert page.locator("#panel .prediction").count() == len(furthest.tokens) + len(furthest.other_tokens)
    tiles = page.locator(".tiles").inner_text()
    assert f"{conversation.totals.bits_per_byte:.4f} and {conversation.totals.other_bits_per_byte:.4f}" in tiles
    assert re.search(r"span", page.locator("#told").inner_text())
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == [] and not page.complaints


def test_the_page_copies_the_spans(opened, conversation):
    page = opened(conversation)
    told = json.loads(page.evaluate("document.getElementById('numbers').textContent"))
    expected = json.loads(conversation.to_json())
    assert {**told["head"], "spans": told["spans"]} == expected


def test_what_datasets_have_in_all(opened, datasets):
    page = opened(datasets)
    tiles = page.locator(".tiles").inner_text()
    assert f"{datasets.totals.difference:+.4f} ± {datasets.error:.4f}" in tiles
    rows = page.locator(".figure.table", has_text="Conversations furthest apart").locator("tbody tr")
    assert rows.count() == len(datasets.conversations)
    assert page.locator("main :is(script, img, b)").count() == 0 and page.evaluate("document.ran") is None
    linked = opened(datasets, source=datasets.to_html({"row": "/compare/{row}"}))
    addresses = linked.locator("tbody a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    assert {f"/compare/{span.sample_index}" for span in datasets.first_spans} <= set(addresses)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE])
def test_no_page_is_wider_than_the_window_and_nothing_acts(opened, conversation, datasets, viewport, scheme):
    for found in (conversation, datasets):
        page = opened(found, viewport, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert page.evaluate("document.ran") is None and not page.complaints
