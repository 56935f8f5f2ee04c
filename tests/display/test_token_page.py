"""The page of a conversation in a real browser, and that nothing in a dataset can act in it."""

import html
import itertools
import json
import re
import shutil

import pytest
from conftest import PHONE, WIDE
from hostile import HOSTILE, analysed

from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED
from explore_logits import execute_analysis

MIXED = (
    "Here:\n\n```python\ndef f(x):\n\tif x:\n        return 1\n```\n"
    "مرحبا بالعالم، هذا نص عربي قصير\n世界您好\nFamily 👨‍👩‍👧‍👦 and 👩🏽‍🚀, flag 🇸🇪, e\u0301 नमस्ते."
)


@pytest.fixture(scope="module")
def analysis(real_extraction):
    return execute_analysis(str(real_extraction), 2, quiet=True)


def token(page, position: int):
    return page.locator(f'#text [data-i="{position}"]')


def is_idle(page) -> bool:
    """Whether the panel tells of no token."""
    return page.locator("#panel").get_attribute("class") == "idle"


def of_status(analysis, status: str) -> list:
    return [found for found in analysis if found.status == status]


def shown_text(page, selector: str) -> str:
    return page.evaluate("s => [...document.querySelectorAll(s)].map(e => e.textContent).join('')", selector)


def test_it_reads_like_the_conversation_and_needs_nothing_else(opened, analysis, source_rows):
    page = opened(analysis)
    question, answer = (turn["value"] for turn in source_rows[2]["conversations"])
    assert page.locator("#text [data-i]").count() == len(analysis)
    assert page.locator("#text .assistant [data-i]").count() == len(
        of_status(analysis, EXTRACTED) + of_status(analysis, SKIPPED)
    )
    assert shown_text(page, ".assistant .t:not(.skipped)") == answer
    assert shown_text(page, ".user .words") == question
    assert shown_text(page, ".skipped[data-i]") == "<|im_end|>"
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert not page.complaints
    tiles = page.locator(".tiles").inner_text()
    assert f"{analysis.totals.perplexity:.2f}" in tiles and f"{analysis.totals.top1_rate:.1%}" in tiles


def test_hovering_shows_predictions_as_bars_and_leaving_hides_them(opened, analysis):
    page, found = opened(analysis), of_status(analysis, EXTRACTED)[9]
    panel = page.locator("#panel")
    assert is_idle(page)
    token(page, found.position).hover()
    told = panel.inner_text()
    assert f"{found.surprisal:.2f} nats" in told and f"{found.entropy:.2f} nats" in told
    bars = panel.locator(".prediction")
    names = bars.locator("span:first-child").all_inner_texts()
    assert [name.strip('"') for name in names[:5]] == [p.text.replace(" ", "␣") for p in found.predictions]
    filled = page.evaluate(
        "[...document.querySelectorAll('.fill')].map(e => e.offsetWidth / e.parentElement.offsetWidth)"
    )
    for share, prediction in zip(filled, found.predictions, strict=False):
        assert share == pytest.approx(prediction.probability, abs=0.02)
    assert page.locator(".prediction.target").count() == 1
    assert names[-1] == "tail" and filled[-1] == pytest.approx(found.tail_mass, abs=0.02)
    page.mouse.move(2, 2)
    assert is_idle(page)


def test_shares_of_a_position_add_up_to_one(opened, analysis):
    page = opened(analysis)
    for found in of_status(analysis, EXTRACTED)[:10]:
        token(page, found.position).hover()
        numbers = page.locator(".prediction:not(.apart) .number").all_inner_texts()
        assert sum(map(float, numbers)) == pytest.approx(1, abs=0.05)


def test_a_click_keeps_a_token_open(opened, analysis):
    page = opened(analysis)
    first, second = (found.position for found in of_status(analysis, EXTRACTED)[3:5])
    heading = page.locator("#panel p").first
    token(page, first).click()
    token(page, second).hover()
    assert heading.inner_text().startswith(f"Token {first},")
    token(page, second).click()
    assert heading.inner_text().startswith(f"Token {second},")
    page.keyboard.press("Escape")
    assert is_idle(page)


def test_skipped_and_prompt_tokens_say_why(opened, analysis):
    page = opened(analysis)
    token(page, of_status(analysis, SKIPPED)[0].position).hover()
    assert "skipped: special token" in page.locator("#panel").inner_text()
    token(page, of_status(analysis, PROMPT)[-2].position).hover()
    assert "part of the prompt" in page.locator("#panel").inner_text()


def test_the_keyboard_moves_through_the_answer(opened, analysis):
    page = opened(analysis)
    positions = [found.position for found in analysis if found.status != PROMPT]

    def focused() -> int:
        return page.evaluate("Number(document.activeElement.dataset.i)")

    page.locator("#after").focus()  # the last control before the conversation
    page.keyboard.press("Tab")
    assert focused() == positions[0] and not is_idle(page)
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", -1), ("Home", 0)):
        page.keyboard.press(key)
        assert focused() == positions[expected]
        assert page.locator("#panel p").first.inner_text().startswith(f"Token {focused()},")
    boxes = []
    for key in ("Home", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
        boxes.append(token(page, focused()).bounding_box())
    tops = [box["y"] for box in boxes]
    assert tops[0] < tops[1] < tops[2] and tops[3] == pytest.approx(tops[1], abs=2)
    assert abs(boxes[1]["x"] - boxes[0]["x"]) < 60


def test_keys_are_the_pages_own_until_a_token_is_open(opened, analysis):
    page = opened(analysis, {"width": 800, "height": 300})
    answer = of_status(analysis, EXTRACTED)
    token(page, answer[0].position).hover()
    before = page.evaluate("scrollY")
    page.keyboard.press("Space")
    page.wait_for_function("before => scrollY > before", arg=before)
    assert "kept" not in page.locator("#panel").get_attribute("class")
    token(page, answer[3].position).click()
    page.keyboard.press("Shift+ArrowRight")  # selects, and moves nowhere
    assert page.evaluate("Number(document.activeElement.dataset.i)") == answer[3].position


def test_closing_gives_the_focus_back_and_showing_moves_nothing(opened, analysis):
    page = opened(analysis)
    first = of_status(analysis, EXTRACTED)[0].position
    listed = page.locator("#listed").bounding_box()
    token(page, first).hover()
    assert page.locator("#listed").bounding_box() == listed
    token(page, first).click()
    page.get_by_role("button", name="Close").click()
    assert is_idle(page) and page.evaluate("Number(document.activeElement.dataset.i)") == first
    assert page.get_by_role("button", name=token(page, first).inner_text()).count() >= 1


def test_selecting_text_opens_nothing_and_copies_the_answer(opened, analysis, source_rows):
    page = opened(analysis)
    extracted = of_status(analysis, EXTRACTED)
    start, end = (token(page, found.position).bounding_box() for found in (extracted[0], extracted[5]))
    page.mouse.move(start["x"] + 1, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] - 1, end["y"] + 5)
    page.mouse.up()
    assert "kept" not in page.locator("#panel").get_attribute("class")
    answer = source_rows[2]["conversations"][1]["value"]
    assert page.evaluate("getSelection().toString()").strip() in answer


def test_the_strip_and_the_list_jump(opened, analysis):
    page = opened(analysis)
    answer = of_status(analysis, EXTRACTED)
    box = page.locator("#strip").bounding_box()
    index = len(answer) * 3 // 4
    page.mouse.click(box["x"] + box["width"] * (index + 0.5) / len(answer), box["y"] + 20)
    assert page.evaluate("Number(document.activeElement.dataset.i)") == answer[index].position
    assert page.locator("#marker").is_visible()
    most = max(answer, key=lambda found: found.surprisal)
    page.locator("#listed a").first.click()
    assert page.evaluate("Number(document.activeElement.dataset.i)") == most.position


def test_only_chooses_what_is_listed(opened, analysis):
    page = opened(analysis.showing(only=lambda found: found.rank is None))
    expected = [found for found in analysis if found.is_extracted and found.rank is None]
    assert page.locator("#listed a").count() == len(expected)
    assert page.locator("#listed h2").inner_text() == "Chosen"
    page = opened(analysis.showing(show_prompt=False))
    assert page.locator("#text [data-i]").count() == len(analysis) - len(of_status(analysis, PROMPT))


def test_the_strip_has_a_bar_a_token_as_high_as_its_surprisal(opened, analysis):
    page = opened(analysis)
    paths = page.evaluate("[...document.querySelectorAll('#strip path')].map(e => e.getAttribute('d'))")
    bars = {int(x): 100 - float(y) for path in paths for x, y in re.findall(r"M(\d+) 100V([\d.]+)", path)}
    surprisals = [found.surprisal for found in of_status(analysis, EXTRACTED)]
    assert sorted(bars) == list(range(len(surprisals)))
    ordered = sorted(range(len(surprisals)), key=lambda i: surprisals[i])
    assert all(bars[a] <= bars[b] for a, b in itertools.pairwise(ordered))


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance of a computed colour."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_can_be_read_and_told_by_lightness_alone(opened, analysis, scheme):
    page = opened(analysis, scheme=scheme)
    paper, ink = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (luminance(paper) > 0.8) == (scheme == "light")
    style = "[...document.querySelectorAll('.scale span')].map(e => getComputedStyle(e).backgroundColor)"
    shades = [luminance(color) for color in page.evaluate(style)[1:]]
    text = luminance(ink)
    for shade in [luminance(paper), *shades]:
        light, dark = max(shade, text), min(shade, text)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    steps = [b - a for a, b in itertools.pairwise(shades)]
    assert all(step < 0 for step in steps) if scheme == "light" else all(step > 0 for step in steps)
    quiet = luminance(page.evaluate("getComputedStyle(document.querySelector('.quiet')).color"))
    bright, dim = max(quiet, luminance(paper)), min(quiet, luminance(paper))
    assert (bright + 0.05) / (dim + 0.05) >= 4.5


@pytest.mark.parametrize("viewport", [WIDE, PHONE, {"width": 320, "height": 568}])
def test_nothing_is_wider_than_the_window(opened, analysis, viewport):
    page = opened(analysis, viewport)
    token(page, of_status(analysis, EXTRACTED)[5].position).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    box = page.locator("#panel").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]
    here = token(page, of_status(analysis, EXTRACTED)[5].position).bounding_box()
    assert not (here["y"] + here["height"] > box["y"] and here["x"] > box["x"] and here["y"] < box["y"] + box["height"])


def test_a_dataset_cannot_act_in_the_page(opened, hostile_extraction):
    found = execute_analysis(str(hostile_extraction), quiet=True)
    texts = {entry.text for entry in found}
    assert set(HOSTILE) <= texts  # each is one token
    page = opened(found)
    for entry in found:
        if entry.text in HOSTILE:
            token(page, entry.position).hover()
    page.locator("#listed a").first.click()
    assert page.evaluate("document.ran") is None and not page.complaints
    assert page.locator("#text :is(script, img, svg, b), #panel :is(script, img, svg), h1 b").count() == 0
    assert "<b onclick=1>out" in page.locator("h1").inner_text()
    shown = shown_text(page, ".assistant .words")
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[6], HOSTILE[7], r"\x1b[31mred\x1b]0;title\x07"):
        assert text in shown
    assert r"\u202egnorw\u202c" in shown and r"\u2066\u2069\u200f\u200b" in shown
    assert not set("\x1b\x07\u202e\u202c\u2066\u2069\u200f\u200b") & set(page.content())


def test_the_policy_stops_what_would_be_smuggled_in(opened, analysis):
    """The page's own defence, should the escaping ever fail."""
    broken = analysis.to_html().replace(
        "</h1>", "</h1><script>document.ran = 1</script><img src=x onerror=document.ran=2>"
    )
    page = opened(analysis, source=broken)
    assert page.evaluate("document.ran") is None
    assert any("Content Security Policy" in text for text in page.complaints)
    token(page, of_status(analysis, EXTRACTED)[0].position).hover()
    assert not is_idle(page)


def test_scripts_and_emoji_across_tokens_are_whole(opened, tmp_path):
    found = analysed(tmp_path, MIXED)
    page = opened(found, {"width": 1280, "height": 1200})
    assert shown_text(page, ".assistant .t:not(.skipped)") == MIXED
    family = next(i for i, entry in enumerate(found) if "👦" in found_text(page, entry))
    assert found_text(page, found[family]) == "👨‍👩‍👧‍👦" and page.locator(f'[data-i="{family - 1}"] .part').count() == 1
    lines = page.locator(".assistant .words")
    rects = page.evaluate(
        "[...document.querySelectorAll('.assistant .t')].map(e => [e.textContent, e.getBoundingClientRect().x])"
    )
    arabic = [x for text, x in rects if re.search(r"[\u0600-\u06ff]", text)]
    assert arabic[0] > arabic[-1]  # from right to left
    indented = [x for text, x in rects if text.strip().startswith(("def", "return"))]
    assert indented[1] > indented[0]
    assert page.evaluate("e => getComputedStyle(e).whiteSpaceCollapse", lines.first.element_handle()) == "preserve"
    part = page.locator("#text .part").first
    part.hover()
    assert page.locator("#panel h3").inner_text().startswith('"\\x')
    assert "bytes of ،" in page.locator("#panel p").first.inner_text()


def found_text(page, entry) -> str:
    return token(page, entry.position).evaluate("e => e.textContent")


def test_a_long_answer_works(opened, tmp_path):
    words = "The quick brown fox jumps over the lazy dog, 1234 times; then it sleeps.\n"
    found = analysed(tmp_path, words * 220)
    answer = of_status(found, EXTRACTED)
    assert len(answer) >= 4000
    page = opened(found)
    assert page.locator("#text .assistant [data-i]").count() == len(answer) + 1
    box = page.locator("#strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 1, box["y"] + 20)
    focused = page.evaluate("Number(document.activeElement.dataset.i)")
    assert answer[-1].position - len(answer) / box["width"] <= focused <= answer[-1].position
    here = token(page, focused).bounding_box()["y"]
    assert 0 < here < WIDE["height"]
    assert page.locator("#strip").bounding_box()["y"] == 0  # still in view
    page.keyboard.press("ArrowUp")
    above = token(page, page.evaluate("Number(document.activeElement.dataset.i)"))
    assert above.bounding_box()["y"] < here


def test_the_notebooks_frame_is_a_page_of_its_own(browser, analysis, tmp_path):
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><h1>Cell</h1>{analysis._repr_html_()}", encoding="utf-8")
    page = browser.new_page(viewport=WIDE)
    page.goto(notebook.as_uri())
    frame = page.frame_locator("iframe")
    found = of_status(analysis, EXTRACTED)[4]
    frame.locator(f'[data-i="{found.position}"]').click()
    assert f"Token {found.position}," in frame.locator("#panel").inner_text()
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).fontSize") == "32px"  # not the frame's style
    page.close()


def test_what_is_not_utf_8_is_no_obstacle(tmp_path):
    """A page and JSON of an answer whose tokens are lone bytes can be written and read."""
    found = analysed(tmp_path, "🙂")
    assert any("\udcf0" in entry.text for entry in found)
    assert "🙂" in html.unescape(found.to_html().encode().decode())
    assert json.loads(found.to_json().encode())["tokens"]
    shutil.rmtree(found.dataset_id)
