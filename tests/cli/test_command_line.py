"""How commands end, and the files that they write."""

import os
import resource
import signal
import threading

import pytest

from chat_logits.cli.command_line import check_output_files, write_result
from chat_logits.cli.signals import Stopped, stop_on_signals
from chat_logits.errors import ToolkitError, UsageError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("terminal_closes")
def test_a_signal_is_known_though_a_library_has_made_an_interrupt_of_its_own(number):
    """As Ray does, which waits in C."""
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
    assert stopped.value.number == number


@pytest.mark.usefixtures("terminal_closes")
def test_a_terminal_that_is_closed_tells_twice_and_stops_once():
    """Its shell sends one signal and the system another, while the first is being followed."""
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
    assert stopped.value.number == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_page_that_does_not_fit_leaves_the_one_before(tmp_path):
    """The disk takes no more than 1,000 bytes a file."""
    page, limits = tmp_path / "page.html", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_result(str(page), "the page before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for file in (page, tmp_path / "new.html"):
            with pytest.raises(ToolkitError, match="cannot be written: File too large"):
                write_result(str(file), "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert page.read_text() == "the page before" and list(tmp_path.iterdir()) == [page]


def test_links_and_pipes_stay_what_they_are(tmp_path):
    page, link, pipe, read = tmp_path / "page.html", tmp_path / "link.html", tmp_path / "pipe", []
    link.symlink_to(page)
    write_result(str(link), "through a link")
    assert link.is_symlink() and page.read_text() == "through a link"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_result(str(pipe), "through a pipe")
    reader.join(60)
    assert read == ["through a pipe"] and pipe.is_fifo()
    ending, beginning = os.pipe()
    write_result(f"/dev/fd/{beginning}", "through one without a name")
    os.close(beginning)
    assert os.read(ending, 100) == b"through one without a name"
    os.close(ending)


def test_a_file_keeps_its_mode_and_may_be_where_no_other_can_be(tmp_path):
    """A name as long as there may be leaves no room for the temporary file's."""
    page, long = tmp_path / "page.html", tmp_path / f"{'x' * 250}.html"
    page.write_text("before")
    page.chmod(0o600)
    for file in (page, long):
        write_result(str(file), "after")
        assert file.read_text() == "after"
    assert page.stat().st_mode & 0o777 == 0o600 and len(list(tmp_path.iterdir())) == 2
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(ToolkitError, match="circle: it cannot be written"):
        write_result(str(circle), "nothing")


@pytest.mark.parametrize("option", ["html", "json"])
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("x" * 300, "File name too long"),
        ("a\0b", "not a valid file name"),
        ("circle/x.html", "Too many levels of symbolic links"),
        ("missing/x.html", "the folder missing is missing"),
    ],
)
def test_what_the_system_refuses_is_named_by_its_option(tmp_path, monkeypatch, option, name, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UsageError) as refused:
        check_output_files(**{option: name})
    assert str(refused.value).startswith(f"`{option}` {name:.80}: {fault}")


def test_a_file_under_two_names_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.html").symlink_to("x.html")
    for other in ("./x.html", str(tmp_path / "x.html"), "link.html", f"../{tmp_path.name}/x.html"):
        with pytest.raises(UsageError, match=r"`html` and `json`: both name x\.html, expected two files"):
            check_output_files(html="x.html", json=other)
    check_output_files(html="x.html", json="-")
    check_output_files(html="x.html", json="y.html")
