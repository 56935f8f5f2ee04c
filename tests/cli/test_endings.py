"""Commands end with a line and never with a traceback, whatever there is of output, environment and patience."""

import resource
import signal
import subprocess
import sys

import pandas
import pytest
from conftest import REPO
from hostile import analysed
from huggingface_hub import constants

import explore_logits
import extract_logits

# Signals the process as soon as it imports this module, as Ctrl-C might; then it is the command.
SIGNALLED_AT = """
import importlib.abc, os, runpy, signal, sys
moment, times, *sys.argv = sys.argv[1:]
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == moment:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                if times == "2":
                    os.kill(os.getpid(), signal.SIGINT)
                raise
sys.meta_path.insert(0, Finder())
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: str, *arguments, shell: str = "", **options) -> subprocess.CompletedProcess:
    command = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, str(REPO / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, **options)


# --- output ---


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_output_and_full_errors_lose_what_they_would_have_shown(quick_run, tmp_path, shell):
    page = tmp_path / "page.html"
    done = run("explore_logits.py", quick_run, "--html", page, shell=shell)
    assert done.returncode == 0
    assert done.stderr in ("", f"Wrote {page}\n") and bool(done.stdout) == shell.startswith("2")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("script", ["explore_logits.py", "extract_logits.py"])
def test_a_full_output_is_an_error_in_a_line(flags, quick_run, script):
    arguments = [quick_run] if script.startswith("explore") else flags("out", "--preview", 2)
    done = run(script, *arguments, shell=">/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr
    assert run(script, *arguments, shell=">/dev/full 2>/dev/full").returncode == 1


def test_a_run_does_not_end_because_its_messages_cannot_be_written(flags, tmp_path):
    done = run("extract_logits.py", *flags("out", "--max_samples", 6), shell="2>/dev/full")
    assert done.returncode == 0 and "6 source rows" not in done.stderr
    assert done.stdout.startswith("Conversations  5 written, 1 skipped")
    assert (tmp_path / "out" / "data/00000/train-00001.parquet").exists()


# --- the environment ---


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize("script", ["explore_logits.py", "extract_logits.py"])
def test_a_home_that_is_no_folder_is_named(flags, quick_run, tmp_path, monkeypatch, capsys, script, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / place))
    command = {"explore_logits.py": explore_logits, "extract_logits.py": extract_logits}[script]
    assert command.main([str(quick_run)] if command is explore_logits else flags("out")) == 2
    told = "not a folder, and none can be made there. Set it to one, or unset it."
    assert capsys.readouterr().err == f"error: HF_HOME {tmp_path / place}: {told}\n"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("HF_ENDPOINT", "hub.local:80", "expected an address with https:// or http://. Set one, or unset it."),
        ("HF_ENDPOINT", "", "expected an address with https:// or http://. Set one, or unset it."),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "no such file. Set it to one, or unset it."),
    ],
)
def test_a_variable_that_the_hubs_client_cannot_use_is_named(quick_run, monkeypatch, capsys, name, value, told):
    monkeypatch.setenv(name, value)
    assert explore_logits.main([str(quick_run)]) == 2
    assert capsys.readouterr().err == f"error: {name} {value}: {told}\n"


def test_a_machine_without_a_place_for_temporary_files_is_told(quick_run):
    """Nothing can be written, as on a read-only disk: files may have 0 bytes."""
    done = run("explore_logits.py", quick_run, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert done.returncode == 2
    assert done.stderr == "error: no folder for temporary files can be written to. Set TMPDIR to one that can.\n"


def test_a_push_without_the_hub_is_refused_before_anything_is_loaded(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert extract_logits.main(flags("out", "--output_repo", "user/x")) == 2
    said = capsys.readouterr().err
    told = "error: --output_repo user/x: offline mode is on (HF_HUB_OFFLINE), so the Hub is not asked"
    assert said.splitlines()[-1] == told and "Opening" not in said and not (tmp_path / "out").exists()


# --- signals ---


@pytest.mark.parametrize(
    ("script", "moment", "times", "words"),
    [
        ("explore_logits.py", "chat_logits.cli.parser", 1, "Stopped.\n"),
        ("explore_logits.py", "chat_logits.analysis", 1, "Stopped.\n"),
        ("export_targets.py", "chat_logits.analysis", 1, "Stopped.\n"),
        ("train_student.py", "chat_logits.cli.command_line", 1, "Stopped.\n"),
        ("explore_logits.py", "rich", 2, "Stopped.\n"),
        ("extract_logits.py", "chat_logits.options", 2, "Stopped.\n"),
        ("extract_logits.py", "chat_logits.extraction.run", 1, "To resume:\n"),
        ("extract_logits.py", "chat_logits.extraction.run", 2, "Stopped.\n"),
        ("extract_logits.py", "transformers", 1, "Stopped. No shard is finished yet.\nTo resume:\n"),
        ("extract_logits.py", "torch", 2, "Stopped.\n"),
    ],
)
def test_ctrl_c_in_the_first_moments_ends_in_lines(flags, quick_run, script, moment, times, words):
    arguments = [quick_run] if script.startswith("explore") else flags("out")
    command = [sys.executable, "-c", SIGNALLED_AT, moment, times, script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr


# --- templates, frames ---


@pytest.mark.parametrize(
    "text", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000]
)
def test_a_template_that_is_nested_too_deep_is_told(flags, tmp_path, capsys, text):
    template = tmp_path / "deep.jinja"
    template.write_text(text)
    assert extract_logits.main([*flags("out", "--preview", 1), "--chat_template", str(template)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: chat template: its expressions or blocks are nested too deep to be read"


def test_a_template_that_calls_itself_is_told(flags, tmp_path, capsys):
    template = tmp_path / "endless.jinja"
    template.write_text("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    assert extract_logits.main([*flags("out", "--preview", 1), "--chat_template", str(template)]) == 1
    assert "the chat template refuses it: maximum recursion depth exceeded" in capsys.readouterr().err


def test_a_frame_with_lone_bytes_can_be_written(tmp_path):
    """Emoji and Thai are several tokens a character here."""
    analysis = analysed(tmp_path, "สวัสดี 🙂🧑‍🚀 naïve")
    assert any("\udc80" <= character <= "\udcff" for token in analysis for character in token.text)
    frame = analysis.to_frame()
    assert len(frame) == len(analysis) and frame["log_prob"].notna().sum() == analysis.totals.num_tokens
    frame.to_json(tmp_path / "frame.json")
    frame.to_parquet(tmp_path / "frame.parquet")
    read = pandas.read_parquet(tmp_path / "frame.parquet")
    assert read["text"].tolist() == frame["text"].tolist() and "\ufffd" in "".join(read["text"])
    expected = [token.text.encode(errors="surrogateescape").decode(errors="replace") for token in analysis]
    assert read["text"].tolist() == expected
