"""The command from its start to Ctrl-C, and what it says where it cannot start."""

import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import REPO
from served import ask

import explore_logits
from chat_logits.browse.server import PORT, listening
from chat_logits.errors import UsageError


def test_ctrl_c_ends_it_in_a_line(quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "out")
    command = [sys.executable, str(REPO / "explore_logits.py"), str(tmp_path / "out"), "--browse", "--no_open"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--port", "0"], **pipes) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r".*/out is at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", line)
        assert ask(int(found[1]), "/")[0] == 200
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=60)
        told = [line for line in told.splitlines() if line.strip() and not line.startswith("Reading the numbers: ")]
        assert (process.returncode, rest.strip(), told) == (0, "Ended.", [])
    assert not (tmp_path / "out" / "marks.sqlite").exists()


def test_a_taken_port_is_told(quick_run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert explore_logits.main([str(quick_run), "--browse", "--no_open", "--port", str(port)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--port {port}" in line and "another port" in line
        with pytest.raises(UsageError, match=str(port)):
            listening(port)


def test_without_a_port_the_next_free_one_is_taken():
    with listening(None) as first, listening(None) as second:
        assert PORT <= first.getsockname()[1] < second.getsockname()[1]
        assert first.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("package", ["duckdb", "starlette", "uvicorn"])
def test_a_missing_package_is_told_with_what_installs_it(quick_run, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say that it is not there
    assert explore_logits.main([str(quick_run), "--browse"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line and 'pip install "chat-logits[browse]"' in line


@pytest.mark.parametrize("others", [["--summary"], ["--html", "x.html"], ["--sample_index", "1"], ["--verify", "1"]])
def test_what_does_not_go_together_is_refused(quick_run, capsys, others):
    assert explore_logits.main([str(quick_run), "--browse", *others]) == 2
    assert explore_logits.main([str(quick_run), "--port", "1"]) == 2
    assert "--browse" in capsys.readouterr().err
