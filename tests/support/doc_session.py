"""A process in which the commands and snippets of the documentation are run one after another.

It imports torch and its like once; its Hub is the one that its environment names. Steps come in and results go out as a
line of JSON each.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What a step ended with. A snippet has status 1 where it raised, with the traceback in ``err``."""

    status: int
    out: str
    err: str


class DocSession:
    """The process, seen from the test. ``environment`` is all of its environment."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def command(self, words: list[str], folder: Path) -> Result:
        """Run one of the commands in a folder."""
        return self._step({"words": words, "folder": str(folder)})

    def snippet(self, code: str, page: str, folder: Path) -> Result:
        """Run Python code in a folder, with the names that the page's snippets before it have made."""
        return self._step({"code": code, "page": page, "folder": str(folder)})

    def _step(self, step: dict) -> Result:
        self._process.stdin.write(json.dumps(step) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended, with status {self._process.wait()}, at {step}"
        return Result(**json.loads(line))

    def close(self) -> None:
        self._process.kill()  # it has nothing to finish
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()


# --- the process itself ---


def _run(step: dict, namespaces: dict[str, dict]) -> int:
    if "code" in step:
        exec(compile(step["code"], step["page"], "exec"), namespaces.setdefault(step["page"], {}))
        return 0
    import explore_logits
    import export_targets
    import extract_logits
    import train_student

    modules = (extract_logits, explore_logits, export_targets, train_student)
    mains = {module.__name__.replace("_", "-"): module.main for module in modules}
    return mains[step["words"][0]](step["words"][1:])


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may come between the answers
    namespaces: dict[str, dict] = {}
    for line in sys.stdin:
        step = json.loads(line)
        os.chdir(step["folder"])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = _run(step, namespaces)
            except (Exception, SystemExit):
                status = 1
                traceback.print_exc()
        print(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
