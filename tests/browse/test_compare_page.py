"""Two datasets in the browser: the comparison of all rows, its way into single ones, and how far it is meanwhile."""

import dataclasses
import shutil
import threading
from collections.abc import Callable

import pytest
from conftest import PHONE, WIDE
from served import ask, pages, served

from chat_logits.analysis.dataset_comparison import compare_datasets
from chat_logits.storage.dataset import StoredDataset, open_dataset


@pytest.fixture(scope="module")
def server(quick_run, other_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(quick_run, folder / "out")
    with served(folder / "out", folder, other_run, begins=False) as running:
        yield running


@pytest.fixture(scope="module")
def comparison(server, other_run):
    return compare_datasets(server.browsed.dataset, open_dataset(str(other_run)), server.browsed.tokenizer)


@pytest.fixture
def opened(browser, server):
    with pages(browser, server, WIDE) as open_page:
        yield open_page


@pytest.mark.parametrize("viewport", [WIDE, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_comparison_of_all_rows_leads_to_each(opened, server, comparison, viewport, scheme):
    page = opened("/compare", viewport, scheme)
    page.wait_for_selector("main.figures")
    tables = page.locator("section.table")
    places = [[link.get_attribute("href") for link in tables.nth(i).locator("tbody a").all()] for i in (0, 1)]
    assert places[0] == [f"/compare/{each.sample_index}#t={each.index}" for each in comparison.tokens]
    assert places[1] == [f"/compare/{each.sample_index}" for each in comparison.conversations]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 22, 26)") == (scheme == "dark")
    tables.nth(0).locator("tbody a").first.click()
    page.wait_for_url(f"**{places[0][0]}")
    assert page.locator(".t.open").get_attribute("data-i") == str(comparison.tokens[0].position)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert all(url.startswith((server.address, "data:")) for url in page.requests) and not page.complaints


def test_keys_go_through_the_compared_rows_of_a_selection(opened, comparison):
    page = opened("/?sort=num_tokens")
    assert page.locator("header a").get_attribute("href") == "/compare"
    rows = [int(row.get_attribute("data-row")) for row in page.locator("tr[data-row]").all()]
    both = [row for row in rows if row < comparison.num_conversations]
    page.locator(f"tr[data-row='{both[1]}'] .pair").focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/compare/{both[1]}?sort=num_tokens")
    assert page.locator("#text .assistant .t").count() > 0
    page.keyboard.press("k")
    page.wait_for_url(f"**/compare/{rows[rows.index(both[1]) - 1]}?sort=num_tokens")
    page.keyboard.press("j")
    page.wait_for_url(f"**/compare/{both[1]}?sort=num_tokens")
    page.keyboard.press("n")
    page.wait_for_selector(".t.open")
    page.locator("nav.frame a").first.click()
    page.wait_for_url("**/?sort=num_tokens")
    assert not page.complaints


def test_a_row_that_the_other_has_not_got_says_so_and_leads_on(opened, server, comparison):
    assert comparison.only_in_first > 0
    page = opened(f"/compare/{server.browsed.dataset.num_rows - 1}")
    assert "is not in it" in page.locator(".notice.error").inner_text()
    page.locator("nav a").first.click()
    page.wait_for_url(f"**/compare/{server.browsed.dataset.num_rows - 2}*")


@dataclasses.dataclass(frozen=True)
class Held(StoredDataset):
    """A dataset whose rows from ``row`` on are read once the ``gate`` is open; ``reached`` is set before that."""

    gate: threading.Event
    reached: threading.Event
    row: int
    then: Callable[[], None] = lambda: None

    def rows(self):
        for number, row in enumerate(super().rows()):
            if number == self.row:
                self.reached.set()
                assert self.gate.wait(120)
                self.then()
            yield row


def held(folder, row: int, **then) -> Held:
    dataset = open_dataset(str(folder))
    fields = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(StoredDataset)}
    return Held(**fields, gate=threading.Event(), reached=threading.Event(), row=row, **then)


def test_a_comparison_that_takes_long_says_how_far_it_is(quick_run, other_run, browser, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    other = held(other_run, 5)
    with served(tmp_path / "out", tmp_path, other, begins=False) as server:
        page = browser.new_page()
        page.goto(f"{server.address}/compare")
        assert other.reached.wait(60)
        # Row 5 of the first waits for row 5 of the other: five have been compared.
        page.wait_for_function("() => document.querySelector('[role=status]')?.textContent.includes(' 5 of ')")
        count = server.browsed.dataset.num_rows
        assert page.locator("[role=status]").inner_text() == f"Comparing: 5 of {count} conversations"
        assert page.locator("progress").get_attribute("max") == str(count)
        other.gate.set()
        page.wait_for_selector("main.figures", timeout=60_000)  # by itself
        page.close()


def test_a_comparison_that_fails_says_why_and_can_be_tried_again(quick_run, other_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    faults = [OSError("the disk is away")]

    def fail():
        if faults:
            raise faults.pop()

    other = held(other_run, 5, then=fail)
    other.gate.set()
    with served(tmp_path / "out", tmp_path, other, begins=False) as server:
        answers = [ask(server.port, "/compare") for _ in range(2)]
        assert server.site.comparison.finished.wait(60)
        status, _, text = ask(server.port, "/compare")
        assert status == 422 and "the disk is away" in text and 'href="/compare?again=1"' in text
        assert all(code in (202, 422) for code, *_ in answers)
        ask(server.port, "/compare?again=1")
        assert server.site.comparison.finished.wait(60)
        status, _, text = ask(server.port, "/compare")
        assert status == 200 and "/compare/" in text
