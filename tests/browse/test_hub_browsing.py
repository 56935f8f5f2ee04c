"""The command on a dataset of the Hub, from its address to a conversation and the next one, in a real browser."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO
from loopback_hub import LoopbackHub

from chat_logits.analysis.row import perplexity_of
from chat_logits.data.stored_messages import question_of
from chat_logits.display.formats import short_perplexity
from chat_logits.storage.dataset import open_dataset


@pytest.fixture
def address(quick_run, tmp_path):
    """Of the command's pages of ``user/many``, which is the quick run, on a Hub of this machine."""
    files = {str(path.relative_to(quick_run)): path.read_bytes() for path in quick_run.rglob("*") if path.is_file()}
    with LoopbackHub() as hub:
        hub.add_repo("dataset", "user/many", files=files)
        environment = {**hub.environment(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}
        command = [sys.executable, str(REPO / "explore_logits.py"), "user/many", "--browse", "--no_open", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                line = process.stdout.readline()
                assert line.startswith("user/many is at "), line
                yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
            finally:
                process.send_signal(signal.SIGINT)
        assert process.returncode == 0


def test_a_dataset_on_the_hub_is_browsed(address, quick_run, browser, tmp_path):
    stored = list(open_dataset(str(quick_run)).rows())
    falling = np.argsort([-row["mean_nll"] for row in stored], kind="stable").tolist()
    page, complaints, asked = browser.new_page(), [], []
    page.set_default_timeout(120_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#view[data-lines=all]")
    assert page.locator("h1").inner_text() == "user/many"
    assert page.locator("tr[data-row]").count() == 50
    questions = page.locator("tbody .question a").all_text_contents()
    assert questions == [question_of(row["messages"]) for row in stored[:50]]
    page.locator("#by-mean_nll").click()
    page.wait_for_function("() => document.body.dataset.shown === 'sort=mean_nll&down=1'")
    rows = [int(row.get_attribute("data-row")) for row in page.locator("tr[data-row]").all()]
    assert rows == falling[:50]
    worst = short_perplexity(perplexity_of(stored[falling[0]]["mean_nll"]))
    assert page.locator("tbody [data-of=perplexity]").first.inner_text() == worst
    page.locator("[name=q]").fill("What is 17")  # of which the messages are fetched
    page.wait_for_function(
        "() => document.body.dataset.shown.startsWith('q=') && !document.querySelector('[data-wait]')"
    )
    found = [i for i in falling if "What is 17" in str(stored[i]["messages"])]
    assert [int(row.get_attribute("data-row")) for row in page.locator("tr[data-row]").all()] == found
    page.locator("tbody .question a").nth(1).click()
    page.wait_for_url(f"**/row/{found[1]}?*")
    said = [page.locator(f"#text .{role} .words").inner_text().strip() for role in ("user", "assistant")]
    said[1] = said[1].removesuffix("<|im_end|>")  # shown, and not extracted
    assert said == [message["content"] for message in stored[found[1]]["messages"]]
    page.keyboard.press("j")
    page.wait_for_url(f"**/row/{found[2]}?*")
    assert f"3 of {len(found)}" in page.locator("nav.frame").inner_text()
    page.keyboard.press("m")
    page.keyboard.type("seen")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.querySelector('#mine .note').textContent === 'seen'")
    page.close()
    assert all(url.startswith((address, "data:")) for url in asked) and not complaints
    assert (tmp_path / "data" / "chat-logits" / "marks.sqlite").exists()
