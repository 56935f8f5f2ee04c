"""The command from its start to Ctrl-C, and what it says where it cannot start."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib

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
    for module in [name for name in sys.modules if name.startswith("chat_logits.browse.")]:
        monkeypatch.delitem(sys.modules, module)
    assert explore_logits.main([str(quick_run), "--browse"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    packages = " ".join(f"'{needed.split(',')[0]}'" for needed in extras["browse"])
    assert package in line and line.endswith(f"pip install {packages}")


def test_beside_an_event_loop_it_serves_until_it_is_interrupted(quick_run, tmp_path):
    """As in a notebook."""
    program = f"""
import asyncio, explore_logits, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
async def cell(): explore_logits.browse_dataset({str(quick_run)!r}, port=0, no_open=True)
asyncio.new_event_loop().run_until_complete(cell())
"""
    (tmp_path / "cell.py").write_text(program)
    command = [sys.executable, str(tmp_path / "cell.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPO)}, **pipes) as process:
        found = re.search(r" is at http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())
        assert ask(int(found[1]), "/")[0] == 200
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=60)
        assert rest.strip() == "Ended." and "RuntimeError" not in told


@pytest.mark.parametrize("others", [["--summary"], ["--html", "x.html"], ["--sample_index", "1"], ["--verify", "1"]])
def test_what_does_not_go_together_is_refused(quick_run, capsys, others):
    assert explore_logits.main([str(quick_run), "--browse", *others]) == 2
    assert explore_logits.main([str(quick_run), "--port", "1"]) == 2
    assert "--browse" in capsys.readouterr().err
