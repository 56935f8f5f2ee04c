"""What a reader does with a conversation's page, in a real browser: colours, threshold, ways, links, copies, frame."""

import json
import math
import re
from dataclasses import replace

import pytest
from conftest import PHONE, WIDE
from hostile import analysed
from test_token_page import MIXED, is_idle, luminance, of_status, token

from chat_logits.analysis.tokens import EXTRACTED, PROMPT, SKIPPED
from explore_logits import execute_analysis, execute_comparison, execute_summary

MEASURES = ("Surprisal", "Entropy", "Rank", "Tail mass")
NARROW, MIDDLE = {"width": 320, "height": 568}, {"width": 900, "height": 800}


@pytest.fixture(scope="module")
def analysis(real_extraction):
    return execute_analysis(str(real_extraction), 2, quiet=True)


def numbers_of(analysis, name: str) -> dict[int, float]:
    """By position, what each extracted token is shaded by; a rank that is not stored counts as the next one."""
    by_name = {
        "Surprisal": lambda found: -found.log_prob,
        "Entropy": lambda found: found.entropy,
        "Rank": lambda found: found.rank or found.kept + 1,
        "Tail mass": lambda found: found.tail_mass,
    }
    return {found.position: by_name[name](found) for found in of_status(analysis, EXTRACTED)}


def shades(page) -> dict[int, int]:
    """By position, the shades that the tokens have."""
    found = page.evaluate("[...document.querySelectorAll('#text .t')].map(e => [e.dataset.i, e.className])")
    return {int(i): int(re.search(r"\bs(\d)\b", name)[1]) for i, name in found if re.search(r"\bs\d\b", name)}


def legend(page) -> list[tuple[float, int]]:
    """Where each shade begins, as the page says."""
    found = page.evaluate("[...document.querySelectorAll('#legend span')].map(e => [e.textContent, e.className])")
    return [(float(label.replace(">64", "65")), int(name[1])) for label, name in found[1:]]


def threshold(page) -> tuple[float, int, int]:
    """The threshold that the page tells, how many tokens are not below it, and of how many."""
    told = page.locator("#told").inner_text()
    number, above, total = re.match(r"(>?[\d.,e-]+)(?: nats)?: ([\d,]+) of ([\d,]+) tokens$", told).groups()
    return float(number.replace(">64", "65")), int(above.replace(",", "")), int(total.replace(",", ""))


def expected_shades(page, numbers: dict[int, float]) -> dict[int, int]:
    least, bounds = threshold(page)[0], legend(page)
    return {
        position: max((shade for bound, shade in bounds if bound <= number), default=0) * (number >= least)
        for position, number in numbers.items()
    }


def focused(page) -> int:
    return page.evaluate("Number(document.activeElement.dataset.i)")


def checked(page) -> str:
    return page.locator("#measures label:has(:checked)").inner_text().strip()


# --- colours and the threshold ---


@pytest.mark.parametrize("by", ["pointer", "keyboard"])
def test_tokens_are_coloured_by_the_number_that_is_chosen(opened, analysis, by):
    page = opened(analysis)
    page.locator("#measures input").first.focus()
    for i, name in enumerate(MEASURES):
        if by == "pointer":
            page.locator("#measures label").nth(i).click()
        elif i:
            page.keyboard.press("ArrowRight")
        assert checked(page) == name
        numbers = numbers_of(analysis, name)
        assert shades(page) == expected_shades(page, numbers)
        assert threshold(page)[1:] == (sum(n >= threshold(page)[0] for n in numbers.values()), len(numbers))
        assert len(set(shades(page).values())) >= 4
        assert page.locator("#named").inner_text().startswith(name)
        strip = page.locator("#strip svg").get_attribute("aria-label")
        assert strip == f"{name} over the answer"
    assert not page.complaints


def test_the_strip_follows_the_number_that_is_chosen(opened, analysis):
    page = opened(analysis)
    page.locator("#measures label", has_text="Entropy").click()
    paths = page.evaluate("[...document.querySelectorAll('#strip path')].map(e => e.getAttribute('d'))")
    heights = {int(x): 97 - float(y) for path in paths for x, y in re.findall(r"M(\d+) 100V([\d.]+)", path)}
    entropies = list(numbers_of(analysis, "Entropy").values())
    assert page.locator("#top").inner_text() == f"{max(entropies):.3g} nats"
    expected = [97 * entropy / max(entropies) for entropy in entropies]
    assert [heights[i] for i in range(len(entropies))] == pytest.approx(expected, abs=0.1)


def test_the_threshold_takes_the_shade_from_what_is_below(opened, analysis):
    page = opened(analysis)
    numbers = numbers_of(analysis, "Surprisal")
    page.locator("#threshold").focus()
    seen = []
    for key in ("Home", "ArrowRight", "PageUp", "ArrowLeft", "End"):
        page.keyboard.press(key)
        least, above, total = threshold(page)
        assert (above, total) == (sum(number >= least for number in numbers.values()), len(numbers))
        assert shades(page) == expected_shades(page, numbers)
        assert page.locator("#threshold").get_attribute("aria-valuetext") == page.locator("#told").inner_text()
        seen.append(least)
    assert seen[0] == 0 < seen[1] < seen[3] < seen[2] < seen[4]
    box = page.locator("#threshold").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert seen[1] < threshold(page)[0] < seen[4]
    assert shades(page) == expected_shades(page, numbers)
    middle = threshold(page)[0]
    page.locator("#measures label", has_text="Rank").click()
    page.locator("#measures label", has_text="Surprisal").click()
    assert threshold(page)[0] == middle  # each number has its own


def test_keys_of_a_control_move_no_token(opened, analysis):
    page = opened(analysis)
    position = of_status(analysis, EXTRACTED)[3].position
    token(page, position).click()
    page.locator("#threshold").focus()
    before = threshold(page)[0]
    page.keyboard.press("ArrowRight")
    assert threshold(page)[0] > before
    assert page.locator("#panel p").first.inner_text().startswith(f"Token {position},")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_weak_models_answer_has_shades_that_can_be_told_apart(opened, tmp_path, scheme):
    found = analysed(tmp_path, "A permit is needed for new buildings, extensions and some facade changes in the city.")
    numbers = numbers_of(found, "Surprisal")
    assert min(numbers.values()) > 2  # a random model: all of it is surprising
    page = opened(found, scheme=scheme)
    page.locator("#threshold").focus()
    page.keyboard.press("Home")
    drawn = shades(page)
    assert len(set(drawn.values())) >= 5
    style = "i => getComputedStyle(document.querySelector(`#text [data-i='${i}']`)).backgroundColor"
    light = {shade: luminance(page.evaluate(style, position)) for position, shade in drawn.items()}
    ordered = [light[shade] for shade in sorted(light)]
    assert ordered == sorted(ordered, reverse=scheme == "light")
    ink = luminance(page.evaluate("getComputedStyle(document.body).color"))
    for shade in ordered:
        assert (max(shade, ink) + 0.05) / (min(shade, ink) + 0.05) >= 4.5


# --- ways ---


@pytest.mark.parametrize("by", ["pointer", "keyboard"])
def test_the_next_and_the_previous_surprising_token(opened, analysis, by):
    page = opened(analysis)
    least = threshold(page)[0]
    above = [position for position, number in numbers_of(analysis, "Surprisal").items() if number >= least]
    assert 5 < len(above) < len(of_status(analysis, EXTRACTED))

    def step(key: str) -> None:
        if by == "keyboard":
            page.keyboard.press(key)
        else:
            page.locator("#after" if key == "n" else "#before").click()

    for number, position in enumerate(above, start=1):
        step("n")
        assert page.locator("#panel p").first.inner_text().startswith(f"Token {position},")
        assert page.locator("#found").inner_text() == f"{number} of {len(above)}"
    step("n")
    assert page.locator("#found").inner_text() == "No more of them after this."
    for position in reversed(above[:-1]):
        step("p")
        assert page.locator("#panel p").first.inner_text().startswith(f"Token {position},")
    step("p")
    assert page.locator("#found").inner_text() == "No more of them before this."


def test_ways_go_on_from_the_token_that_has_the_focus(opened, analysis):
    page = opened(analysis)
    above = [i for i, number in numbers_of(analysis, "Surprisal").items() if number >= threshold(page)[0]]
    middle = next(found.position for found in analysis if found.position > above[3] and found.position not in above)
    token(page, middle).click()
    page.keyboard.press("n")
    assert focused(page) == next(position for position in above if position > middle)


# --- links ---


def test_a_token_has_an_address(opened, analysis):
    page = opened(analysis)
    extracted = of_status(analysis, EXTRACTED)
    pages = page.evaluate("history.length")
    token(page, extracted[5].position).click()
    assert page.evaluate("location.hash") == "#t=5"
    assert page.locator("#panel a").get_attribute("href") == "#t=5"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("location.hash") == "#t=6"
    token(page, of_status(analysis, SKIPPED)[0].position).click()
    assert page.evaluate("location.hash") == "" and page.locator("#panel a").count() == 0
    token(page, extracted[5].position).click()
    page.keyboard.press("Escape")
    assert page.evaluate("location.hash") == "" and is_idle(page)
    assert page.evaluate("history.length") == pages  # tokens are no pages to go back through
    address = page.url.partition("#")[0]
    page.goto("about:blank")
    page.goto(f"{address}#t=7")
    assert focused(page) == extracted[7].position
    assert page.locator("#panel p").first.inner_text().startswith(f"Token {extracted[7].position},")
    most = max(extracted, key=lambda found: -found.log_prob)
    page.locator("#listed a").first.click()
    assert page.evaluate("location.hash") == f"#t={extracted.index(most)}"
    assert page.locator("#listed a").first.get_attribute("href") == f"#t={extracted.index(most)}"


@pytest.mark.parametrize(
    ("link", "told"),
    [
        ("#t=99999", "There is no token 99999: the extracted ones are 0 to {last}"),
        ("#t=-1", "#t=-1 is no link to a token; expected #t=0 to #t={last}"),
        ("#t=1e1", "#t=1e1 is no link to a token; expected #t=0 to #t={last}"),
        ("#<img src=x onerror=document.ran=1>", "is no link to a token; expected #t=0 to #t={last}"),
    ],
)
def test_a_link_to_no_token_is_told(opened, analysis, link, told):
    page = opened(analysis)
    last = len(of_status(analysis, EXTRACTED)) - 1
    page.goto(f"{page.url}{link}")
    page.wait_for_function("() => !document.getElementById('problem').hidden")
    assert told.format(last=last) in page.locator("#problem").inner_text()
    assert is_idle(page) and page.evaluate("document.ran") is None
    page.goto(f"{page.url.partition('#')[0]}#t=3")  # within the page
    page.wait_for_function("() => document.getElementById('problem').hidden")
    assert focused(page) == of_status(analysis, EXTRACTED)[3].position


# --- copies ---


def clipboard(page) -> str:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    return page.evaluate("navigator.clipboard.readText()")


def copied(page, name: str) -> str:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("document.getElementById('copied').textContent = ''")  # that of a copy before
    page.get_by_role("button", name=name).click()
    page.wait_for_function("() => document.getElementById('copied').textContent")
    return clipboard(page)


def same(found, expected) -> bool:
    """Whether two values of JSON are the same; e to a power may differ in its last bit."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-14)
    return found == expected and type(found) is type(expected)


def test_the_conversation_is_copied_as_text(opened, analysis, source_rows):
    question, answer = (turn["value"] for turn in source_rows[2]["conversations"])
    assert copied(opened(analysis), "Copy text") == f"user:\n{question}\n\nassistant:\n{answer}\n"


def test_json_has_the_numbers_of_every_token(opened, analysis):
    page = opened(analysis)
    found = json.loads(copied(page, "Copy JSON"))
    assert same(found, json.loads(analysis.to_json()))
    assert len(found["tokens"]) == len(analysis)
    assert re.match(r"JSON copied, [\d,]+ characters", page.locator("#copied").inner_text())


def test_json_of_a_comparison_has_both_models_numbers(opened, comparison):
    assert same(json.loads(copied(opened(comparison), "Copy JSON")), json.loads(comparison.to_json()))


def test_json_says_what_is_infinite_as_the_command_does(opened, analysis):
    index = next(i for i, found in enumerate(analysis.tokens) if found.is_extracted)
    tokens = list(analysis.tokens)
    tokens[index] = replace(tokens[index], log_prob=-math.inf, rank=None)
    found = replace(analysis, tokens=tokens)
    page = opened(found)
    told = json.loads(copied(page, "Copy JSON"))["tokens"][index]
    assert (told["log_prob"], told["surprisal"], told["probability"]) == (None, None, 0)
    assert shades(page)[tokens[index].position] == 7 and not page.complaints


def test_without_a_clipboard_the_text_is_there_to_be_copied(opened, analysis):
    """As where the page may not write to it: the old way first, and then a field with the text selected."""
    page = opened(analysis)
    page.evaluate("void (navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')))")
    text = copied(page, "Copy text")
    assert text.startswith("user:\n") and "assistant:\n" in text
    assert page.locator("#by_hand").is_hidden() and "copied" in page.locator("#copied").inner_text()
    page.evaluate("void (document.execCommand = () => false)")
    page.get_by_role("button", name="Copy JSON").click()
    page.locator("#by_hand").wait_for(state="visible")
    assert "Not allowed" in page.locator("#copied").inner_text()
    selected = "e => e.value.slice(e.selectionStart, e.selectionEnd)"
    assert same(json.loads(page.locator("#by_hand").evaluate(selected)), json.loads(analysis.to_json()))
    page.locator("#by_hand").press("n")  # a key in a field is the field's
    assert is_idle(page)
    page.keyboard.press("Escape")
    assert page.locator("#by_hand").is_hidden()


# --- code ---


def test_code_is_in_a_fixed_width_face_with_its_lines(opened, tmp_path):
    found = analysed(tmp_path, MIXED)
    page = opened(found)
    faces = page.evaluate(
        "[...document.querySelectorAll('.assistant .t')]"
        ".map(e => [e.textContent, getComputedStyle(e).fontFamily.includes('monospace'), e.getBoundingClientRect().y])"
    )
    code = "".join(text for text, is_fixed, _ in faces if is_fixed)
    assert code.strip() == "```python\ndef f(x):\n\tif x:\n        return 1\n```"
    lines = {text.strip(): y for text, is_fixed, y in faces if is_fixed and text.strip() in ("def", "if", "return")}
    assert lines["def"] < lines["if"] < lines["return"]
    widths = page.evaluate(
        """[...document.querySelectorAll('.assistant .fenced')].filter(e => /^[\\w(): ]+$/.test(e.textContent))
        .map(e => e.getBoundingClientRect().width / e.textContent.length)"""
    )
    assert len(widths) > 3 and max(widths) - min(widths) < 0.05


def test_the_list_shows_letters_where_tokens_are_bytes_of_them(opened, tmp_path):
    found = analysed(tmp_path, "مرحبا بالعالم، هذا نص عربي قصير")
    assert any("\udc80" <= entry.text[0] <= "\udcff" for entry in of_status(found, EXTRACTED) if entry.text)
    page = opened(found)
    listed = page.locator("#listed ol").inner_text()
    assert "\\x" not in listed and re.search(r"[\u0600-\u06ff]{3}", listed)
    for link in page.locator("#listed a").all():
        position = int(link.get_attribute("data-go"))
        is_part = link.locator(".part").count() == 1
        assert is_part == any("\udc80" <= character <= "\udcff" for character in found[position].text)
    summary = opened(execute_summary(found.dataset_id, quiet=True))
    where = summary.locator(".figure.table td[data-title=Where]").all_inner_texts()
    assert where and not any("\\x" in text for text in where)


# --- the frame ---


def framed(analysis, folder) -> list:
    """Three pages of a server's selection, as files."""
    files = [folder / f"{name}.html" for name in ("first", "second", "third")]
    for i, file in enumerate(files):
        frame = {
            "home": "home.html?sort=mean_nll",
            "previous": files[i - 1].name if i else None,
            "next": files[i + 1].name if i < 2 else None,
            "place": f"{i + 1} of 3",
            "downloads": {"JSONL": "rows.jsonl"},
        }
        file.write_text(analysis.to_html(frame), encoding="utf-8")
    return files


def test_previous_and_next_conversation(opened, analysis, tmp_path):
    files = framed(analysis, tmp_path)
    page = opened(analysis)
    assert page.locator("nav").count() == 0  # a file alone has no others
    page.keyboard.press("j")
    page.goto(files[1].as_uri())
    assert page.locator("nav .place").inner_text() == "2 of 3"
    for key, expected in (("j", 2), ("j", 2), ("k", 1), ("k", 0), ("k", 0)):
        page.keyboard.press(key)
        page.wait_for_url(files[expected].as_uri())
        assert page.locator("nav .place").inner_text() == f"{expected + 1} of 3"
    page.get_by_role("link", name="Next").click()
    page.wait_for_url(files[1].as_uri())
    links = {link.inner_text(): link.get_attribute("href") for link in page.locator("nav a").all()}
    assert links["All conversations"] == "home.html?sort=mean_nll" and links["JSONL"] == "rows.jsonl"
    page.locator("#threshold").focus()
    page.keyboard.press("Control+j")
    page.keyboard.press("k")  # of no use to a slider
    page.wait_for_url(files[0].as_uri())


def test_addresses_of_a_frame_are_no_code(opened, analysis):
    hostile = 'javascript:document.ran=1//"><script>document.ran=2</script>'
    page = opened(analysis, source=analysis.to_html({"home": hostile, "next": hostile, "place": "<b>1</b>"}))
    page.keyboard.press("j")
    page.get_by_role("link", name="All conversations").click()
    assert page.evaluate("document.ran") is None
    assert page.locator("nav script, nav b").count() == 0


# --- every page ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, MIDDLE, PHONE, NARROW])
def test_no_control_is_wider_than_the_window(opened, analysis, comparison, viewport, scheme):
    frame = {"home": "/", "previous": "/row/1", "next": "/row/3", "place": "1,234,567 of 9,876,543"}
    for found in (analysis, comparison):
        page = opened(found, viewport, scheme, found.to_html(frame))
        page.locator("#measures label").last.click()
        page.locator("#after").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        for control in page.locator("nav a, .controls :is(label, input, button, output), #bar button").all():
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"] and box["height"] >= 12
        assert not page.complaints and [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


def test_the_most_surprising_tokens_are_above_the_fold(opened, analysis):
    page = opened(analysis)
    for entry in page.locator("#listed a").all()[:10]:
        box = entry.bounding_box()
        assert box["y"] + box["height"] <= WIDE["height"]


def test_forced_colours_and_less_motion(opened, analysis):
    page = opened(analysis)
    page.emulate_media(forced_colors="active", reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.keyboard.press("n")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"  # what is open is told by more than a background
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDE["width"]
    page.emulate_media(forced_colors="none", reduced_motion="no-preference")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"


def test_no_control_lets_a_dataset_act(opened, hostile_extraction):
    found = execute_analysis(str(hostile_extraction), quiet=True)
    frame = {"home": "x", "place": "</nav><script>document.ran = 1</script>", "downloads": {"<img src=x>": "y"}}
    page = opened(found, source=found.to_html(frame))
    for label in page.locator("#measures label").all():
        label.click()
        page.keyboard.press("Home")
        page.keyboard.press("n")
    text, numbers = copied(page, "Copy text"), json.loads(copied(page, "Copy JSON"))
    assert "</script><script>document.ran = 1</script>" in text
    assert same(numbers, json.loads(found.to_json()))
    for entry in page.locator("#listed a").all():
        entry.click()
    assert page.evaluate("document.ran") is None and not page.complaints
    assert page.locator("body :is(img, svg svg, b b), nav :is(script, img)").count() == 0
    assert not set("\x1b\x07\u202e\u202c\u2066\u2069\u200f\u200b") & set(page.content())


# --- two models ---


@pytest.fixture(scope="module")
def comparison(real_extraction, other_extraction):
    return execute_comparison(str(real_extraction), str(other_extraction), 2, quiet=True)


def test_a_comparison_begins_with_what_differs_between_the_runs(opened, comparison, real_extraction, other_extraction):
    page = opened(comparison)
    here, there = (
        json.loads((folder / "extraction.json").read_text()) for folder in (real_extraction, other_extraction)
    )
    differing = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    told = page.locator(".differences summary").inner_text()
    assert set(told.removeprefix("What differs between the runs: ").split(", ")) == differing
    page.locator(".differences summary").click()
    rows = [row.locator("td").all_inner_texts() for row in page.locator(".differences tbody tr").all()]
    assert {row[0] for row in rows} == differing and rows[0][0] == "model_id"
    revisions = next(row for row in rows if row[0] == "model_revision")
    assert revisions[1:] == [f"{run['model_revision'][:12]}…" for run in (here, there)]
    assert page.locator(".differences").bounding_box()["y"] < page.locator("#strip").bounding_box()["y"]
    extracted = [pair for pair in comparison if pair.is_extracted]
    furthest = sorted(range(len(extracted)), key=lambda i: -extracted[i].kl)
    links = [link.get_attribute("href") for link in page.locator("#listed a").all()]
    assert links == [f"#t={i}" for i in furthest[: len(links)]] and len(links) == 12
    page.locator("#listed a").nth(1).click()
    assert focused(page) == extracted[furthest[1]].first.position


def test_the_strip_shows_something_of_close_models(opened, comparison):
    """The same tokens, a ten-thousandth as far apart, beside one that is far apart."""
    tokens = [replace(pair, kl=pair.kl * 1e-4) if pair.is_extracted else pair for pair in comparison.tokens]
    last = max(i for i, pair in enumerate(tokens) if pair.is_extracted)
    tokens[last] = replace(tokens[last], kl=2.0)
    page = opened(replace(comparison, tokens=tokens))
    paths = page.evaluate("[...document.querySelectorAll('#strip path')].map(e => e.getAttribute('d'))")
    heights = [97 - float(y) for path in paths for y in re.findall(r"M\d+ 100V([\d.]+)", path)]
    assert "logarithmic" in page.locator("#top").inner_text()
    assert sum(height > 10 for height in heights) > len(heights) / 3
    page.locator("#threshold").focus()
    page.keyboard.press("Home")
    assert len(set(shades(page).values())) >= 6


def test_a_group_of_bars_has_its_models_name_whatever_it_is(opened, comparison):
    page = opened(comparison)
    page.keyboard.press("n")
    names = [comparison.first.model_id, comparison.other.model_id]
    assert page.locator("#panel h4").all_inner_texts() == names
    model = replace(comparison.other, model_id=comparison.first.model_id)  # two revisions of one model
    page = opened(replace(comparison, other=model))
    page.keyboard.press("n")
    titles = page.locator("#panel h4").all_inner_texts()
    revisions = next(each for each in comparison.differences if each.key == "model_revision")
    assert titles == [f"{names[0]} ({each[:12]}…)" for each in (revisions.first, revisions.other)]


def test_prompts_are_no_targets(opened, analysis):
    page = opened(analysis)
    prompt = {found.position for found in of_status(analysis, PROMPT)}
    assert not prompt & shades(page).keys()
