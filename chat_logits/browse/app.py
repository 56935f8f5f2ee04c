"""The addresses of the server and their answers."""

import json
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from chat_logits.analysis.cross_tokenizer import compare_any
from chat_logits.analysis.filtering import messages_of, write_dataset
from chat_logits.browse.browsed import Browsed
from chat_logits.browse.front import losses, parts
from chat_logits.browse.index import Clock
from chat_logits.browse.jobs import DONE, FAILED, IDLE, Job
from chat_logits.browse.marks import Mark, is_whole
from chat_logits.browse.render import in_frame, policy, render, script, whole
from chat_logits.browse.security import Guard
from chat_logits.browse.view import Range, View, view_of
from chat_logits.display.results import shown
from chat_logits.display.text import line_of, plain, quoted, visible
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.paths import expanded
from chat_logits.storage.dataset import StoredDataset
from chat_logits.words import count_text

LINES_MOST = 64  # rows in a request
DIGITS_MOST = 18  # of a number in an address
BODY_MOST = 64 * 2**10  # bytes of a request's body
AT_ONCE = 0.7  # seconds to wait for a comparison of all rows before its page shows the progress
FRONT, FRAME = ("marking.js", "browse.js"), ("marking.js", "frame.js")


class BadRequest(UsageError):
    """A malformed request."""


class Site:
    """The browsed dataset, ``other`` to compare it with, if any, and the answers to requests."""

    def __init__(self, browsed: Browsed, other: StoredDataset | None = None, other_tokenizer=None):
        """``other_tokenizer`` is that of ``other``, None if it is the same as that of ``browsed``."""
        self.other_tokenizer = other_tokenizer
        self.browsed, self.other, self.token = browsed, other, secrets.token_urlsafe(24)
        self.comparison = Job(self._compare)

    def app(self, port: int):
        """The ASGI application, which only answers at ``port`` of this machine."""
        get = {
            "/": self.front,
            "/view": self.view,
            "/losses": self.losses,
            "/lines": self.lines,
            "/summary": self.summary,
            "/compare": self.compared,
            "/row/{row}": self.row,
            "/compare/{row}": self.pair,
            "/indices": self.indices,
            "/messages": self.messages,
        }
        post = {"/losses": self.begin_summary, "/marks": self.put_mark, "/save": self.save}
        routes = [Route(path, _told(answer), methods=["GET"]) for path, answer in get.items()]
        routes += [Route(path, _posted(answer), methods=["POST"]) for path, answer in post.items()]
        application = Starlette(routes=routes, exception_handlers={404: _not_found, 405: _not_found})
        return Guard(application, port, self.token)

    def _compare(self, watch: Callable):
        return self._compared(None, watch=watch)

    # --- the front page ---

    def prepare(self) -> None:
        """Make the front page once, so that its templates are read and the answers about all rows are cached."""
        self._front(View(), None, Clock())

    def front(self, request: Request, clock: Clock) -> Response:
        return self._front(*_view_or_error(request), clock)

    def _front(self, view: View, error: str | None, clock: Clock) -> Response:
        browsed, status = self.browsed, 400 if error else 200
        shown_parts, error = self._parts(view, clock, error)
        role, span = next(iter(view.roles.items()), ("", Range()))
        roles = sorted({*browsed.index.roles(clock), "user", "assistant", role} - {""})
        code = script(*FRONT)
        page = whole(
            "browse.html.jinja",
            code=code,
            token=self.token,
            title=line_of(browsed.dataset.dataset_id),
            subtitle=f"What {line_of(browsed.dataset.manifest.model_id)} predicted in place of every extracted token",
            view=view,
            hidden=[(name, str(span)) for name, span in view.ranges.items()],
            roles=roles,
            chosen_role=role or "user",
            chosen_span=["" if end is None else f"{end:g}" for end in (span.low, span.high)],
            tags=browsed.index.tags(clock),
            losses=losses(browsed.summary, browsed),
            **shown_parts,
        )
        return HTMLResponse(page, status, {"content-security-policy": policy(code)})

    def view(self, request: Request, clock: Clock) -> Response:
        view, error = _view_or_error(request)
        shown_parts, error = self._parts(view, clock, error)
        return HTMLResponse(render("view.html.jinja", **shown_parts), 400 if error else 200)

    def _parts(self, view: View, clock: Clock, error: str | None) -> tuple[dict, str | None]:
        other = line_of(self.other.dataset_id) if self.other else None
        try:
            return parts(self.browsed, view, clock, error, other), error
        except UsageError as found:  # a condition that DuckDB cannot use
            told = str(found).replace("`", "")
            return parts(self.browsed, View(), clock, told, other), told

    def losses(self, _request: Request, _clock: Clock) -> Response:
        return HTMLResponse(render("losses.html.jinja", losses=losses(self.browsed.summary, self.browsed)))

    def lines(self, request: Request, _clock: Clock) -> Response:
        text = request.query_params.get("rows", "")
        rows, total = [_number(part) for part in text.split(",")[: LINES_MOST + 1]], self.browsed.dataset.num_rows
        known = [row for row in rows if row is not None and row < total]
        if not 0 < len(rows) <= LINES_MOST or len(known) < len(rows):
            raise BadRequest(f"rows={text[:40]}: expected 1 to {LINES_MOST} numbers of rows below {total:,}")
        return JSONResponse([_line(line) for line in self.browsed.lines(known)])

    def begin_summary(self, _content: dict) -> Response:
        self.browsed.summary.start()
        return HTMLResponse(render("losses.html.jinja", losses=losses(self.browsed.summary, self.browsed)))

    # --- pages of display ---

    def row(self, request: Request, clock: Clock) -> Response:
        return self._framed(request, clock, self._analysis)

    def pair(self, request: Request, clock: Clock) -> Response:
        return self._framed(request, clock, self._comparison)

    def _analysis(self, row: int):
        return self.browsed.analysis(row)

    def _comparison(self, row: int):
        if self.other is None:
            raise UsageError("no other dataset: start the server with `compare` OTHER")
        return self._compared(row)

    def _compared(self, row: int | None, **watched):
        """The comparison of all rows with the other dataset's, or of one row."""
        assert self.other is not None  # callers have checked
        browsed = self.browsed
        sides = (browsed.dataset, self.other, browsed.tokenizer, self.other_tokenizer)
        return compare_any(*sides, row, browsed.chat_template, **watched)

    def _framed(self, request: Request, clock: Clock, analyse: Callable) -> Response:
        text, base = request.path_params["row"], request.url.path.split("/")[1]
        view, row = view_of(request.query_params), _number(text)
        if row is None or row >= self.browsed.dataset.num_rows:
            count = count_text(self.browsed.dataset.num_rows, "row")
            raise UsageError(f"row {text:.40}: {self.browsed.dataset.dataset_id} has {count}")
        frame = self._frame(view, row, base, clock)
        try:
            page = shown(analyse(row)).to_html(frame)
        except ToolkitError as error:
            names = {"Previous": frame["previous"], "Next": frame["next"], "All conversations": frame["home"]}
            return _error_page(f"Row {row}", str(error), [(name, at) for name, at in names.items() if at], 422)
        source_index = self.browsed.index.source_index(row, clock)
        mark = self.browsed.mark_of(source_index) if source_index is not None else Mark("", [])
        code = script(*FRAME)
        content = {"mark": mark, "source_index": source_index, "token": self.token}
        page, its_policy = in_frame(page, code, **content)
        return HTMLResponse(page, headers={"content-security-policy": its_policy})

    def _frame(self, view: View, row: int, base: str, clock: Clock) -> dict:
        near, source = self.browsed.index.neighbours(view, row, clock), self.browsed.index.source_index(row, clock)
        query = view.query(page=1)

        def to(row: int | None) -> str | None:
            return None if row is None else f"/{base}/{row}" + f"?{query}" * bool(query)

        place = f"{near['place']:,} of {near['of']:,}" if near["place"] else "not in the selection"
        page = (near["place"] - 1) // 50 + 1 if near["place"] else 1
        return {
            "home": f"/?{view.query(page=page)}",
            "previous": to(near["previous"]),
            "next": to(near["next"]),
            "place": place,
            "downloads": {"Messages": f"/messages?source_index={source}..{source}"} if source is not None else {},
        }

    def summary(self, _request: Request, _clock: Clock) -> Response:
        job = self.browsed.summary
        if job.state != DONE:
            raise UsageError("the summary is not ready yet: start it on the front page; it reads all rows")
        return _display_page(shown(job.result).to_html({"home": "/", "row": "/row/{row}"}))

    def compared(self, request: Request, _clock: Clock) -> Response:
        """The comparison of all rows, which the first request starts; its progress until it is done."""
        if self.other is None:
            raise UsageError("no other dataset: start the server with `compare` OTHER")
        job = self.comparison
        if job.state == IDLE or (job.state == FAILED and "again" in request.query_params):
            job.start()
        job.finished.wait(AT_ONCE)
        if job.state == FAILED:
            links = [("All conversations", "/"), ("Try again", "/compare?again=1")]
            return _error_page("The datasets cannot be compared", job.reason, links, 422)
        if job.state != DONE:
            return self._waiting(job)
        return _display_page(shown(job.result).to_html({"home": "/", "row": "/compare/{row}"}))

    def _waiting(self, job: Job) -> Response:
        assert self.other is not None
        title = f"{line_of(self.browsed.dataset.dataset_id)} and {line_of(self.other.dataset_id)}"
        total = job.total or self.browsed.dataset.num_rows
        told = f"Comparing: {job.done:,} of {count_text(total, 'conversation')}"
        page = whole("waiting.html.jinja", title=title, told=told, done=job.done, total=total)
        return HTMLResponse(page, 202, {"content-security-policy": policy()})

    # --- downloading and saving ---

    def indices(self, request: Request, clock: Clock) -> Response:
        chosen = self.browsed.index.chosen(view_of(request.query_params), clock)
        if any(source is None for _, source in chosen):
            raise ToolkitError("rows without a source row are chosen, as their shard is damaged: choose others")
        text = "".join(f"{source}\n" for source in sorted(source for _, source in chosen))
        return PlainTextResponse(text, headers={"content-disposition": 'attachment; filename="indices.txt"'})

    def messages(self, request: Request, clock: Clock) -> Response:
        chosen = self.browsed.index.chosen(view_of(request.query_params), clock)
        found = messages_of(self.browsed.dataset, sorted(row for row, _ in chosen))
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in found)  # a damaged row aborts the download
        named = {"content-disposition": 'attachment; filename="messages.jsonl"'}
        return StreamingResponse(lines, media_type="application/jsonl", headers=named)

    def save(self, content: dict) -> Response:
        """Write the rows of a view as a logit dataset into a new folder."""
        folder, query = content.get("folder"), content.get("query")
        if not isinstance(folder, str) or not folder.strip() or not isinstance(query, str) or not is_whole(query):
            raise BadRequest("expected the folder to write to")
        place = expanded(folder.strip(), "folder")
        view = View.read(parse_qsl(query))
        rows = sorted(row for row, _ in self.browsed.index.chosen(view, Clock()))
        write_dataset(self.browsed.dataset, rows, place, view.where if view.is_where_alone else None)
        return JSONResponse({"told": f"{count_text(len(rows), 'conversation')} written to {Path(place).resolve()}"})

    # --- marks ---

    def put_mark(self, content: dict) -> Response:
        source_index = content.get("source_index")
        if not isinstance(source_index, int) or isinstance(source_index, bool) or not 0 <= source_index < 2**63:
            raise BadRequest("expected the number of a source row")
        mark = Mark.read(content.get("note"), content.get("tags"))
        self.browsed.mark(source_index, mark)
        return JSONResponse({"note": mark.note, "tags": mark.tags})


def _number(text: str) -> int | None:
    """A number in an address, from 0 and below 10**18, None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= DIGITS_MOST else None


def _view_or_error(request: Request) -> tuple[View, str | None]:
    try:
        return view_of(request.query_params), None
    except UsageError as error:
        return View(), str(error)


def _line(line) -> dict:
    """A line of the list for JSON, with None for infinite numbers."""
    content = {"row": line.row, "question": line_of(line.question), "bars": line.bars, "at": line.at}
    told = {"fault": line.fault and visible(line.fault), "surprisal": line.surprisal}
    return plain({**content, **told, "token": quoted(line.token)[1:-1], "before": line_of(line.before)})


def _display_page(page: str) -> Response:
    """A page of ``display`` as it is; it has its own policy."""
    return HTMLResponse(page, headers={"content-security-policy": "frame-ancestors 'none'"})


# --- answers ---


def _told(answer: Callable) -> Callable:
    """An endpoint whose answers report the time of DuckDB and of the rest, and errors as text."""

    def endpoint(request: Request) -> Response:
        clock, start = Clock(), time.perf_counter()
        response = _in_words(partial(answer, request, clock))
        own = 1000 * (time.perf_counter() - start) - clock.duckdb
        response.headers["server-timing"] = f"duckdb;dur={clock.duckdb:.1f}, own;dur={own:.1f}"
        return response

    return endpoint


def _posted(answer: Callable) -> Callable:
    """An endpoint that takes a JSON object."""

    async def endpoint(request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        body = b""
        async for part in request.stream():
            body += part
            if len(body) > BODY_MOST:
                return PlainTextResponse(f"expected {BODY_MOST:,} bytes at most\n", 413)
        try:
            content = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            return PlainTextResponse("expected a JSON object\n", 400)
        return await run_in_threadpool(_in_words, partial(answer, content), is_page=False)

    return endpoint


def _in_words(answer: Callable[[], Response], is_page: bool = True) -> Response:
    try:
        return answer()
    except Exception as error:
        status = 400 if isinstance(error, UsageError) else 422 if isinstance(error, ToolkitError) else 500
        text = str(error) if isinstance(error, ToolkitError) else f"{type(error).__name__}; this was not expected"
        text = visible(text.replace("`", ""))
        return (
            _error_page("This cannot be shown", text, [("All conversations", "/")], status)
            if is_page
            else (PlainTextResponse(text, status))
        )


def _error_page(title: str, message: str, links: list[tuple[str, str]], status: int) -> Response:
    page = whole("error.html.jinja", title=title, message=message, links=links)
    return HTMLResponse(page, status, {"content-security-policy": policy()})


def _not_found(request: Request, error) -> Response:
    path = Path(request.url.path).name[:60]
    return _error_page("Not here", f"Nothing is at {visible(path)}", [("All conversations", "/")], error.status_code)
