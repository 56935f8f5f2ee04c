"""Help explains every option, and costs no import of torch."""

import re
import subprocess
import sys

import pytest
from conftest import REPO

import explore_logits
import export_targets
import extract_logits
import train_student
from chat_logits.options import options_of

COMMANDS = {
    "extract_logits": extract_logits,
    "explore_logits": explore_logits,
    "export_targets": export_targets,
    "train_student": train_student,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_does_not_import_torch(name):
    code = (
        f"import sys, {name}\n"
        "try:\n"
        f"    {name}.main(['--help'])\n"
        "except SystemExit as left:\n"
        "    heavy = sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))\n"
        "    print('STATUS', left.code, 'HEAVY', heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "STATUS 0 HEAVY []", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_with_its_default(name):
    for kind in COMMANDS[name].KINDS:
        for one in options_of(kind).values():
            assert one.help and re.search(r"\((default: .+|required)\)$", one.full_help, re.S), one.name
            assert re.fullmatch(r"[a-z_]+", one.name)


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_options_are_wrong_use(name, capsys):
    assert COMMANDS[name].main([]) == 2
    assert capsys.readouterr().err.startswith("error: required: --")
