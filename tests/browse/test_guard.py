"""Who may ask: this server's own pages, from this machine, by its own address. And what an error tells."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from many_rows import damaged
from served import ask, served


@pytest.fixture(scope="module")
def server(quick_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    shutil.copytree(quick_run, folder / "out")
    with served(folder / "out", folder) as running:
        yield running


def test_it_listens_on_this_machine_alone(server):
    status, headers, text = ask(server.port, "/")
    assert status == 200 and "<table" in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["server-timing"].startswith("duckdb;dur=") and "own;dur=" in headers["server-timing"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1", "localhost.evil.example", ""])
def test_another_name_gets_nothing(server, host):
    """DNS rebinding: the name leads here, but it is not this server's."""
    for path in ("/", "/view", "/lines?rows=0", "/messages", "/row/0"):
        status, _, text = ask(server.port, path, host=host)
        assert status == 403 and len(text) < 100
    assert ask(server.port, "/", host=f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_sites_requests_get_nothing(server, site):
    for path in ("/", "/view", "/lines?rows=0", "/messages"):
        for mode, dest in (("cors", "empty"), ("no-cors", "script"), ("navigate", "iframe")):
            headers = {"sec_fetch_site": site, "sec_fetch_mode": mode, "sec_fetch_dest": dest}
            assert ask(server.port, path, **headers)[0] == 403
    assert ask(server.port, "/", origin="http://evil.example")[0] == 403
    followed = {"sec_fetch_site": site, "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert ask(server.port, "/", **followed)[0] == 200  # a link, which shows the other site nothing


def test_changes_need_the_token_of_the_pages(server):
    body = json.dumps({"source_index": 1, "note": "n", "tags": []})
    for token in ({}, {"x_browse_token": "wrong"}, {"x_browse_token": server.token, "origin": "http://evil.example"}):
        assert ask(server.port, "/marks", "POST", body, **token)[0] == 403
    assert ask(server.port, "/marks", "PUT", body, x_browse_token=server.token)[0] == 403
    assert server.browsed.marks.all() == {}
    assert ask(server.port, "/marks", "POST", body, x_browse_token=server.token)[0] == 200
    assert server.browsed.marks.all()[1].note == "n"
    for wrong in ("[]", "{", "{}", '{"source_index": "1", "note": "", "tags": []}', "x" * 70_000):
        status, _, text = ask(server.port, "/marks", "POST", wrong, x_browse_token=server.token)
        assert status in (400, 413) and "Traceback" not in text


@pytest.mark.parametrize(
    "path", ["/row/9999", "/lines?rows=9999", "/lines?rows=a", "/view?sort=x", "/x/../y", "/?q=%ff"]
)
def test_errors_are_words(server, path):
    status, headers, text = ask(server.port, path)
    assert "Traceback" not in text and "site-packages" not in text and ".py" not in text
    assert status in (200, 400, 404) and headers["content-security-policy"]


def test_another_sites_page_cannot_read(server, browser):
    """A page of another origin of this machine, in a real browser, asks in every way that it has."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>other</title>")

        def log_message(self, *_):
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    page = browser.new_page()
    try:
        page.goto(f"http://127.0.0.1:{other.server_port}/")
        read = """async address => {
            const tried = [];
            for (const options of [{}, {mode: 'no-cors'}, {method: 'POST', body: '{}', mode: 'no-cors'}]) {
                try { const r = await fetch(address + '/view', options); tried.push((await r.text()).length); }
                catch { tried.push('refused'); }
            }
            const frame = document.createElement('iframe');
            const loaded = new Promise(resolve => frame.onload = resolve);
            frame.src = address;
            document.body.append(frame);
            await loaded;
            try { tried.push(frame.contentDocument ? frame.contentDocument.body.textContent : 'refused'); }
            catch { tried.push('refused'); }
            const script = document.createElement('script');
            const ended = new Promise(resolve => {
                script.onload = () => resolve('ran');
                script.onerror = () => resolve('refused');
            });
            script.src = address + '/lines?rows=0';
            document.body.append(script);
            tried.push(await ended);
            return tried;
        }"""
        assert [each for each in page.evaluate(read, server.address) if each not in ("refused", 0, "")] == []
    finally:
        page.close()
        other.shutdown()


def test_a_damaged_row_is_told_in_its_place(quick_run, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(quick_run, folder)
    damaged(folder)
    with served(folder, tmp_path) as server:
        status, _, text = ask(server.port, "/row/0")
        assert status == 422 and "train-00000.parquet" in text and "Traceback" not in text
        lines = json.loads(ask(server.port, "/lines?rows=0,5")[2])
        assert lines[1]["fault"] is None and lines[1]["bars"]
        assert ask(server.port, "/row/5")[0] == 200
        assert "train-00000.parquet" in ask(server.port, "/losses")[2]
