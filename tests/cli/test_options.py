"""Command lines: both spellings, mistakes in a line or two, files beside them, and words that give a config again."""

import subprocess
import sys

import pytest
from conftest import CONVERSATIONS, MODEL, REPO

import explore_logits
import extract_logits
from chat_logits.cli import explore_options, extract_options
from chat_logits.cli.extract_options import ExtractOptions, config_words, read_config
from chat_logits.extraction.config import ExtractConfig
from chat_logits.options import options_of

PARSERS = {"extract": extract_options, "explore": explore_options}
NEEDED = ["--model_id", "m", "--dataset_id", "d.jsonl"]


def config_of(*words: str, **options) -> ExtractConfig:
    return read_config(ExtractOptions(**options), extract_options.build_parser().given([*NEEDED, *words]))


@pytest.mark.parametrize("command", PARSERS)
def test_every_option_is_known_with_underscores_and_with_dashes(command):
    parser = PARSERS[command].build_parser()
    for kind in PARSERS[command].KINDS:
        for name, one in options_of(kind).items():
            value = [] if one.kind is bool else ["1"] * (one.count or 1)
            spelled = [parser.given([f"--{text}", *value]) for text in (name, name.replace("_", "-"))]
            assert spelled[0] == spelled[1] and list(spelled[0]) == [name]
            if value and one.kind is not tuple:
                assert parser.given([f"--{name.replace('_', '-')}=1"]) == spelled[0]
    shown = parser.format_help(is_whole=True)
    assert "--trust_remote_code" in shown and "--trust-remote-code" not in shown and "--no_debug" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-kk", "3"], "--top-kk: no such option; did you mean --top_k?"),
        (["--batch-token=3"], "--batch-token: no such option; did you mean --batch_tokens?"),
        (["--frobnicate"], "--frobnicate: no such option; --help_all lists them"),
        (["-k", "3"], "-k: no such option"),
        (["--top_k", "many"], "--top_k 'many': expected a whole number, 1 or more"),
        (["--top_k"], "--top_k: expected one argument"),
        (["--top_p", "half"], "--top_p 'half': expected a number"),
        (["--top-p", "2"], "--top_p 2.0: expected a number above 0 and up to 1"),
        (["--device_map", "even"], "--device_map even: expected one of auto, balanced, sequential"),
        (["--overwrite=yes"], "--overwrite: expected no value, found 'yes'"),
        (["chats"], "chats: unexpected; every value follows the name of its option"),
        (["--preview", "0"], "--preview 0: expected 1 or more"),
        (["--log_level", "loud"], "--log_level loud: expected one of debug, info, warning, error"),
        (["--max_memory", "{}"], "--max_memory: it goes with --device_map"),
    ],
)
def test_mistakes_are_a_line_without_usage(words, message, capsys):
    assert extract_logits.main([*NEEDED, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and len(said.splitlines()) == 1


def test_what_is_required_is_told(capsys):
    assert extract_logits.main(["--model_id", "m"]) == 2
    assert capsys.readouterr().err == "error: required: --dataset_id\n"


def test_values_may_begin_like_options():
    config = config_of("--system_prompt", "--- be brief ---", "--seed", "3", "--device", "cpu")
    assert config.system_prompt == "--- be brief ---" and config.seed == 3


@pytest.mark.parametrize("words", [["outputs/x"], ["--top_n", "3", "outputs/x"], ["--logit-dataset-id", "outputs/x"]])
def test_a_dataset_may_be_named_without_its_option(words):
    assert explore_options.build_parser().given(words)["logit_dataset_id"] == "outputs/x"


def test_a_second_dataset_is_refused(capsys):
    assert explore_logits.main(["one", "two"]) == 2
    assert capsys.readouterr().err.startswith("error: two: unexpected")


def test_the_command_line_wins_over_a_file_and_says_so(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("top_k: 8\nseed: 3\nstreaming: true\nprefix_cache: false\n")
    assert extract_logits.main([*NEEDED, "--config", str(file), "--top-k", "9", "--seed", "3", "--no-streaming"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"The command line wins over {file}: ")
    assert (
        "--top_k 9 (line 1 has 8)" in first and "--streaming False (line 3 has True)" in first and "seed" not in first
    )
    assert "nowhere to write: give --output_repo USER/NAME, --output_dir FOLDER, or both" in second
    config = config_of("--top-k", "9", "--no_streaming", config=str(file))
    assert (config.top_k, config.seed, config.streaming, config.prefix_cache) == (9, 3, False, False)


def test_the_words_of_a_config_give_it_again():
    config = ExtractConfig(
        model_id="m",
        dataset_id="d.jsonl",
        system_prompt="- brief\n",
        template_kwargs={"enable_thinking": False},
        skip_tokens=("<a>", "<b>"),
        top_p=0.5,
        prefix_cache=False,
        streaming=True,
        device_map="auto",
        max_memory={"0": "60GiB"},
    )
    assert read_config(ExtractOptions(), extract_options.build_parser().given(config_words(config))) == config


HEAVY = "sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules))"


def imported_by(module: str, *words) -> tuple[int, list[str]]:
    """Exit status of a command in a process of its own, and which heavy packages it has imported."""
    code = f"import sys, {module}\nstatus = {module}.main()\nprint((status, {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=REPO, capture_output=True, text=True)
    return eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "places",
    [(MODEL, "missing.jsonl"), (MODEL, "./missing"), (MODEL / "none", CONVERSATIONS)],
)
def test_what_is_missing_is_told_before_anything_heavy_is_imported(places, tmp_path):
    words = ("--model_id", places[0], "--dataset_id", places[1], "--output_dir", tmp_path / "out")
    assert imported_by("extract_logits", *words) == (2, [])
    assert not (tmp_path / "out").exists()


def test_a_preview_does_without_torch():
    words = ("--model_id", MODEL, "--dataset_id", CONVERSATIONS, "--preview", 1)
    status, heavy = imported_by("extract_logits", *words)
    assert status == 0 and "torch" not in heavy
