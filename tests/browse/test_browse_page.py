"""The list in a real browser: everything by pointer and by keyboard, light and dark, wide and narrow."""

import json
import shutil

import pytest
from conftest import PHONE, WIDE
from served import pages, served

from chat_logits.browse.index import Clock
from chat_logits.browse.view import View


@pytest.fixture(scope="module")
def server(quick_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browse")
    shutil.copytree(quick_run, folder / "out")
    with served(folder / "out", folder) as running:
        yield running


@pytest.fixture
def opened(browser, server):
    with pages(browser, server, WIDE) as open_page:
        yield open_page


def rows_of(server, **given) -> list[int]:
    return [row for row, _ in server.browsed.index.chosen(View(**given), Clock())]


def shown(page, query: str) -> list[int]:
    """The rows in the list, once it is that of this query."""
    page.wait_for_function("query => document.body.dataset.shown === query", arg=query)
    return [int(row.get_attribute("data-row")) for row in page.locator("tr[data-row]").all()]


@pytest.mark.parametrize("viewport", [WIDE, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_list_is_whole_and_asks_nobody_else(opened, server, viewport, scheme):
    page = opened(viewport=viewport, scheme=scheme)
    assert shown(page, "") == list(range(50))
    page.wait_for_selector("#view[data-lines=all]")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert all(url.startswith((server.address, "data:")) for url in page.requests) and not page.complaints
    line = server.browsed.lines([3])[0]
    row = page.locator("tr[data-row='3']")
    assert row.locator(".question a").inner_text() == line.question
    place = row.locator(".worst a")
    assert place.get_attribute("href").endswith(f"/row/3#t={line.at}")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 22, 26)") == (scheme == "dark")


def test_sorting_by_pointer_and_keyboard_is_an_address(opened, server):
    page = opened()
    page.locator("#by-mean_nll").click()
    assert shown(page, "sort=mean_nll&down=1") == rows_of(server, sort="mean_nll", down=True)[:50]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Perplexity")
    page.locator("#by-mean_nll").focus()
    page.keyboard.press("Enter")
    assert shown(page, "sort=mean_nll") == rows_of(server, sort="mean_nll")[:50]
    assert page.evaluate("document.activeElement.id") == "by-mean_nll"
    page.go_back()
    assert shown(page, "sort=mean_nll&down=1") == rows_of(server, sort="mean_nll", down=True)[:50]
    assert page.url.endswith("?sort=mean_nll&down=1")
    page.reload()
    assert shown(page, "sort=mean_nll&down=1") == rows_of(server, sort="mean_nll", down=True)[:50]


def test_search_and_filters(opened, server):
    page = opened()
    page.keyboard.press("/")
    page.keyboard.type("WHAT IS 17")
    assert shown(page, "q=WHAT+IS+17") == rows_of(server, text="what is 17") != []
    assert "17" in page.locator("tbody .question").nth(0).inner_text()
    page.locator("[name=where]").fill("num_tokens > 30")
    page.keyboard.press("Enter")
    both = rows_of(server, text="what is 17", where="num_tokens > 30")
    assert shown(page, "q=WHAT+IS+17&where=num_tokens+%3E+30") == both
    page.locator(".chips a").first.click()
    assert len(shown(page, "where=num_tokens+%3E+30")) == len(rows_of(server, where="num_tokens > 30")[:50])
    assert page.locator("[name=q]").input_value() == ""
    page.locator("[name=where]").fill("nothing > 1")
    page.keyboard.press("Enter")
    page.wait_for_selector(".notice.error")
    assert "no column nothing" in page.locator(".notice.error").inner_text()


def test_a_histogram_is_brushed_by_pointer_and_keys(opened, server):
    page = opened()
    plot = page.locator(".hist[data-name=num_tokens] .plot")
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.41, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.69, box["y"] + 30)
    page.mouse.up()
    page.wait_for_function("() => document.body.dataset.shown.startsWith('num_tokens=')")
    hist = page.locator(".hist[data-name=num_tokens]")
    assert (hist.get_attribute("data-low"), hist.get_attribute("data-high")) == ("16", "28")
    view = View.read([tuple(page.evaluate("document.body.dataset.shown").replace("%2E", ".").split("="))])
    assert shown(page, view.query()) == rows_of(server, ranges=view.ranges)[:50]
    thumb = page.locator("#num_tokens-high")
    thumb.focus()
    page.keyboard.press("ArrowRight")
    moved = "document.querySelector('#num_tokens-high').ariaValueNow === '29'"
    page.wait_for_function(f"() => {moved} && !document.querySelector('[aria-busy]')")
    assert page.evaluate("document.activeElement.id") == "num_tokens-high"
    page.keyboard.press("Escape")
    shown(page, "")


def test_the_keyboard_goes_through_rows_and_pages_and_opens(opened, server):
    page = opened()
    shown(page, "")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('tr').dataset.row") == "1"
    page.keyboard.press("PageDown")
    assert shown(page, "page=2")[0] == 50
    page.wait_for_function("() => document.activeElement.closest('tr')?.dataset.row === '50'")
    page.keyboard.press("ArrowUp")
    assert shown(page, "")[-1] == 49
    page.wait_for_function("() => document.activeElement.closest('tr')?.dataset.row === '49'")
    page.keyboard.press("End")
    last = shown(page, "page=4")
    assert last[-1] == len(rows_of(server)) - 1
    page.keyboard.press("Home")
    shown(page, "")
    page.wait_for_function("() => document.activeElement.closest('tr')?.dataset.row === '0'")
    page.keyboard.press("Enter")
    page.wait_for_url("**/row/0")
    page.keyboard.press("j")
    page.wait_for_url("**/row/1")
    assert "2 of" in page.locator("nav.frame").inner_text() and not page.complaints
    page.keyboard.press("k")
    page.wait_for_url("**/row/0")


def test_a_conversation_stays_in_its_selection(opened, server):
    chosen = rows_of(server, sort="mean_nll", down=True)
    page = opened("/?sort=mean_nll&down=1")
    page.locator("tbody .question a").nth(3).click()
    page.wait_for_url(lambda url: url.endswith(f"/row/{chosen[3]}?sort=mean_nll&down=1"))
    page.locator("nav.frame [rel=next]").click()
    page.wait_for_url(lambda url: url.endswith(f"/row/{chosen[4]}?sort=mean_nll&down=1"))
    page.locator("nav.frame a").first.click()
    assert shown(page, "sort=mean_nll&down=1")[4] == chosen[4]


def test_marks_are_made_by_keys_and_pointer_and_filter(opened, server):
    page = opened()
    shown(page, "")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("m")
    page.keyboard.type("look <b>again</b>")
    page.keyboard.press("Tab")
    page.keyboard.type("odd, new")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#mark-2.marked")
    assert page.locator("#mark-2 i").all_inner_texts() == ["new", "odd"]
    source = server.browsed.index.source_index(2, Clock())
    assert server.browsed.marks.all()[source].note == "look <b>again</b>"
    page.locator("[name=marked]").check()
    assert shown(page, "marked=1") == [2]
    page.goto(f"{server.address}/row/2")
    page.locator("#mark").click()
    assert page.locator("#marking [name=note]").input_value() == "look <b>again</b>"
    page.locator("#marking [name=note]").fill("done")
    page.locator("#marking [value=save]").click()
    page.wait_for_function("() => document.querySelector('#mine .note').textContent === 'done'")
    page.keyboard.press("m")
    page.keyboard.press("Escape")
    assert not page.locator("#marking").is_visible() and not page.complaints
    assert server.browsed.marks.all()[source].note == "done"


def test_the_largest_losses_open_their_places(opened, server):
    page = opened()
    losses = server.browsed.summary.result.largest_losses
    links = page.locator("#losses .places").first.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        f"/row/{loss.sample_index}#t={loss.index}" for loss in losses
    ]
    links.first.click()
    page.wait_for_url(f"**/row/{losses[0].sample_index}#t={losses[0].index}")
    assert page.locator(".t.open").get_attribute("data-i") == str(losses[0].position)


def test_a_selection_is_taken_along(opened, server, tmp_path):
    query, chosen = "where=num_tokens+%3E+60", rows_of(server, where="num_tokens > 60")
    page = opened(f"/?{query}")
    page.locator("#out summary").click()
    with page.expect_download() as begun:
        page.get_by_text("Messages (.jsonl)").click()
    lines = [json.loads(line) for line in begun.value.path().read_text(encoding="utf-8").splitlines()]
    stored = [server.browsed.dataset.read_row(row) for row in chosen]
    assert [line["source_index"] for line in lines] == [row["source_index"] for row in stored]
    assert lines[0]["messages"][0]["content"] == stored[0]["messages"][0]["content"]
    page.locator("#save [name=folder]").fill(str(tmp_path / "saved"))
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('saved').textContent.includes('written')")
    from chat_logits.storage.dataset import open_dataset

    saved = list(open_dataset(str(tmp_path / "saved")).rows())
    assert [row["source_index"] for row in saved] == [row["source_index"] for row in stored]
    page.locator("#save button").click()
    page.wait_for_function("() => document.getElementById('saved').textContent.includes('saved')")
    page.keyboard.press("Escape")
    assert not page.locator(".sheet").is_visible()
    assert page.evaluate("document.activeElement.parentElement.id") == "out"
    page.keyboard.press("Enter")
    assert page.locator(".sheet").is_visible()
    page.locator("h1").click()
    assert not page.locator(".sheet").is_visible()


def test_a_hostile_dataset_runs_nothing(browser, hostile_extraction, tmp_path):
    shutil.copytree(hostile_extraction, tmp_path / hostile_extraction.name)
    with served(tmp_path / hostile_extraction.name, tmp_path) as server:
        page, asked, complaints = browser.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        for path in ("/", "/?q=%3Cscript%3E&tag=%3Cimg%3E", "/row/0", "/summary", "/?sort=%3Csvg%20onload%3D1%3E"):
            page.goto(server.address + path)
            if path == "/":
                page.wait_for_selector("#view[data-lines=all]")
            assert page.evaluate("document.ran") is None
            assert page.locator("img, script[src], iframe").count() == 0
        assert all(url.startswith((server.address, "data:")) for url in asked)
        assert [each for each in complaints if "400" not in each] == []
        page.close()
