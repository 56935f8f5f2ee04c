"""Help explains every option, and costs no import of torch."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPO

import explore_logits
import export_targets
import extract_logits
import train_student
from chat_logits.cli.parser import example_of, read_options
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


def printed_help(name: str, word: str, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        COMMANDS[name].main([word])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_basic_options_and_help_all_the_others_too(name, capsys):
    options = {one.name: one for kind in COMMANDS[name].KINDS for one in options_of(kind).values()}
    basic = {one.name for one in options.values() if one.is_basic}
    required = {one.name for one in options.values() if one.is_required}
    assert required <= basic and 3 <= len(basic) <= 10

    def listed(text: str) -> set[str]:
        found = set(re.findall(r"^  --(\w+)", text, re.M)) - {"help_all"}
        return {name if name in options else name.removeprefix("no_") for name in found}

    short = printed_help(name, "--help", capsys)
    assert listed(short) == basic == listed(printed_help(name, "-h", capsys))
    assert short.endswith(f"\n--help_all shows all {len(options)} options.\n")
    for word in ("--help_all", "--help-all"):
        assert listed(printed_help(name, word, capsys)) == set(options)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_typed_as_they_stand(name, capsys):
    parser, shown = COMMANDS[name].build_parser(), " ".join(printed_help(name, "--help", capsys).split())
    for kind in COMMANDS[name].KINDS:
        for one in options_of(kind).values():
            if one.is_basic:
                given = parser.given(shlex.split(example_of(one)))
                assert list(given) == [one.name] and read_options(kind, given)[one.name] != one.default
                assert f"; e.g. {example_of(one)}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_options_are_wrong_use(name, capsys):
    assert COMMANDS[name].main([]) == 2
    assert capsys.readouterr().err.startswith("error: required: --")
