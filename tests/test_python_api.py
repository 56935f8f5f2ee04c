"""``chat_logits.extract`` from Python and in a notebook: what the command does."""

import errno
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient
from runs import files_in, options_for
from tqdm import tqdm

from chat_logits.stages import refresh

CALL = "import chat_logits\ndone = chat_logits.extract(chat_logits.ExtractConfig(**{options!r}))\n"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, chat_logits\nchat_logits.ExtractConfig\nprint({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


class File(io.StringIO):
    is_full = False

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_a_bar_that_cannot_be_written_keeps_no_lock():
    """The thread that draws it would have it for ever, and the run wait for it at its next batch."""
    file = File()
    bar = tqdm(total=2, file=file)
    file.is_full = True
    with ThreadPoolExecutor(1) as thread, pytest.raises(OSError, match="No space"):
        thread.submit(refresh, bar).result()
    locks = bar.get_lock().locks
    assert [lock.acquire(True, 10) for lock in locks] == [True, True]
    for lock in locks:
        lock.release()
    file.is_full = False
    bar.close()


@pytest.mark.slow
def test_in_a_notebook_function_and_command_write_the_same_files(quick_model, calm_source, tmp_path):
    """A kernel's streams are not a terminal's."""
    options = options_for(quick_model, calm_source, tmp_path / "function")
    options = {name: value if isinstance(value, int) else str(value) for name, value in options.items()}
    options["max_samples"] = 12
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "command")
    cells = [
        f"{CALL.format(options=options)}print(done.conversations, sum(done.skipped.values()), done.folder)",
        f"import extract_logits\nprint('status', extract_logits.main({flags!r}))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    place = {"metadata": {"path": str(REPO)}}
    NotebookClient(notebook, timeout=500, startup_timeout=300, resources=place).execute()
    printed = ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in notebook.cells]
    assert printed[0] == f"10 2 {tmp_path / 'function'}\n"
    assert "10 written, 2 skipped" in printed[1] and printed[1].endswith("status 0\n")
    files = files_in(tmp_path / "function")
    assert len(files) == 7 and files == files_in(tmp_path / "command")
