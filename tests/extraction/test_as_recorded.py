"""A run from its first line to its last: stages in their order, what a resumed run takes, and what to type next."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from runs import without

import explore_logits
import extract_logits
from chat_logits.cli.explore_options import build_parser
from chat_logits.cli.extract_report import duration_text, looking_commands
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run import Extraction
from chat_logits.extraction.run_description import default_rows_per_shard

CHOSEN = {"top_k": "8", "rows_per_shard": "4", "max_samples": "6", "seed": "5", "system_prompt": "Be brief."}
STAGES = [
    "Looking for the model",
    "Importing torch and transformers",
    "Reading the model's configuration",
    "Reading the tokenizer",
    "Opening the dataset",
    "Choosing the chat template on the first conversations",
    "Aligning the first conversations",
    "Telling which run it is",
    "Loading ",
    "Checking the model: padded batches and shared prefixes",
]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("data/*/*.parquet"))}


@pytest.fixture
def start(flags) -> list[str]:
    """Options that say nothing but where, and with which template."""
    return without("--rows_per_shard", flags("out"))


@pytest.fixture
def begun(start, tmp_path, capsys):
    """A finished run with options of its own, its shards, and what it printed."""
    options = [word for name, value in CHOSEN.items() for word in (f"--{name}", value)]
    assert extract_logits.main([*start, "--no_all_turns", *options]) == 0
    return tmp_path / "out", shards(tmp_path / "out"), capsys.readouterr()


def test_stages_are_told_in_their_order_and_nothing_of_transformers_is(begun):
    said = begun[2].err
    stages = [line for line in said.splitlines() if line.endswith(" …")]
    assert len(stages) == len(STAGES)
    assert all(line.startswith(stage) for line, stage in zip(stages, STAGES, strict=True)), stages
    assert re.search(r"Forward passes of up to \d+ padded tokens, logits of up to \d+ rows", said)
    assert "Loading weights" not in said and "deprecated" not in said and "[transformers]" not in said


def test_the_last_lines_are_time_speed_and_commands_to_paste(begun, tmp_path, capsys, monkeypatch):
    folder, _, printed = begun
    lines = printed.out.splitlines()
    tokens = int(re.search(r"Tokens +([\d,]+) extracted", printed.out)[1].replace(",", ""))
    number = r"([\d.,e+]+)"
    found = re.fullmatch(f"Time +{number} s, {number} s of it computing: {number} tokens extracted a second", lines[-1])
    whole, computing, rate = (float(number.replace(",", "")) for number in found.groups())
    assert computing <= whole and tokens / (computing + 0.06) * 0.99 <= rate
    first, second = printed.err.split("To look at it:\n")[1].splitlines()[:2]
    assert second == f"{first} --browse"
    python, script, *words = shlex.split(first)
    assert (python, script) == ("python", "explore_logits.py")
    monkeypatch.chdir(tmp_path)
    assert explore_logits.main(words) == 0
    assert f"of {folder}" in capsys.readouterr().out


def test_what_is_left_out_is_taken_from_the_record_and_told(begun, start, capsys):
    folder, whole, _ = begun
    (folder / "data/00000/train-00001.parquet").unlink()
    assert extract_logits.main(start) == 0
    printed = capsys.readouterr()
    assert shards(folder) == whole
    told = "Options not given, taken from the resumed run: "
    (line,) = [line for line in printed.err.splitlines() if line.startswith(told)]
    assert set(line.removeprefix(told).split(", ")) == {f"--{name} {value}" for name, value in CHOSEN.items()}
    assert "--top_k 8" in printed.err.split("To repeat:\n")[1]
    ends = "Ends           at the recorded --max_samples 6, which was left out here."
    (line,) = [line for line in printed.out.splitlines() if line.startswith("Ends")]
    assert line.startswith(ends) and "--output_dir" in printed.out and "--overwrite" in printed.out
    assert extract_logits.main([*start, "--max_samples", "6"]) == 0
    assert "Ends" not in capsys.readouterr().out
    assert extract_logits.main(start) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; nothing was left to compute")


@pytest.mark.parametrize("rows", [256, 1024])
def test_rows_a_shard_that_no_option_chose_are_kept_without_a_word(start, tmp_path, capsys, rows):
    """1,024 are the default of a run on an accelerator, which may go on anywhere."""
    assert extract_logits.main([*start, "--rows_per_shard", str(rows)]) == 0
    whole = shards(tmp_path / "out")
    (tmp_path / "out/data/00000/train-00000.parquet").unlink()
    capsys.readouterr()
    assert extract_logits.main(start) == 0
    assert "Left out" not in capsys.readouterr().err
    assert shards(tmp_path / "out") == whole
    recorded = json.loads((tmp_path / "out/extraction.json").read_text())
    assert recorded["rows_per_shard"] == rows


def test_a_new_run_on_a_cpu_has_256_rows_a_shard(start, tmp_path):
    assert extract_logits.main(start) == 0
    assert json.loads((tmp_path / "out/extraction.json").read_text())["rows_per_shard"] == 256


@pytest.mark.parametrize(
    ("run", "rows"),
    [
        (("cuda", 239.0 * 80, 3000, 1), 1024),
        (("mps", 239.0 * 80, 100, 1), 1024),
        (("cpu", 239.0 * 80, 3_000_000, 1), 256),
        (("cuda", 1025.0 * 80, 3_000_000, 1), 256),  # a gigabyte of stored rows would wait to be written
        (("cuda", 239.0 * 80, 32_767, 8), 256),  # fewer than four shards for each worker
        (("cuda", 239.0 * 80, 32_768, 8), 1024),
        (("cuda", 239.0 * 80, None, 1), 1024),
        (("cuda", 239.0 * 1088, None, 1), 256),  # --top_k 1024 --num_sampled 64
    ],
)
def test_rows_a_shard_by_default(run, rows):
    assert default_rows_per_shard(*run) == rows


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--top_k 64", "top_k: 8 there, 64 here"),
        ("--rows_per_shard 256", "rows_per_shard: 4 there, 256 here"),
        ("--all_turns", "all_turns: false there, true here"),
    ],
)
def test_a_value_that_is_typed_is_refused_though_it_is_the_default(begun, start, capsys, typed, named):
    folder, whole, _ = begun
    assert extract_logits.main([*start, *typed.split()]) == 2
    assert f"holds another run ({named})" in capsys.readouterr().err
    assert shards(folder) == whole


def test_columns_template_and_tokens_are_taken_too(start, chat_file, tmp_path, capsys):
    """Two columns that could each be meant, a template of one's own, a word left alone, answers' ends kept."""
    text = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"yes {i} yes"}],
         "question": "b", "answer": "no"}
        for i in range(6)
    ]  # fmt: skip
    start = [*without("--chat_template", start), "--dataset_id", str(chat_file(rows))]
    chosen = ["--messages_column", "messages", "--chat_template", text, "--max_length", "50", "--rows_per_shard", "4"]
    assert extract_logits.main([*start, *chosen]) == 0
    whole = shards(tmp_path / "out")
    (tmp_path / "out/data/00000/train-00000.parquet").unlink()
    capsys.readouterr()
    assert extract_logits.main(start) == 0
    said = capsys.readouterr().err
    assert shards(tmp_path / "out") == whole
    assert all(f"{name} " in said for name in ("--messages_column", "--chat_template", "--max_length"))
    assert extract_logits.main([*start, "--prompt_column", "question", "--response_column", "answer"]) == 2
    assert "columns: " in capsys.readouterr().err


def test_a_config_knows_what_it_was_given():
    config = ExtractConfig(model_id="m", dataset_id="d", top_k=64, max_length=None)
    assert config.given == {"model_id", "dataset_id", "top_k"}
    assert replace(config, seed=1).given >= {"top_k", "num_sampled"}  # of a copy, all are


def extraction(**options) -> Extraction:
    config = ExtractConfig(model_id="m", dataset_id="d", **options)
    numbers = dict.fromkeys(("conversations", "turns_left_out", "tokens", "num_bytes", "new_tokens"), 1)
    here = int(bool(config.output_dir))
    more = {"skipped": {}, "remarks": {}, "mean_nll": 1.0, "seconds": 1.0, "computing": 1.0, "bytes_in_folder": here}
    return Extraction(config=config, folder=config.folder, url=None, **numbers, **more)


@pytest.mark.parametrize(
    ("program", "options", "command"),
    [
        ("python extract_logits.py", {"output_dir": "out/my chats"}, "python explore_logits.py 'out/my chats'"),
        ("python3 -X dev code/extract_logits.py", {"output_dir": "o"}, "python3 -X dev code/explore_logits.py o"),
        ("/v/bin/python /v/bin/extract-logits", {"output_dir": "o"}, "/v/bin/python /v/bin/explore-logits o"),
        ("python extract_logits.py", {"output_repo": "u/x"}, "python explore_logits.py u/x"),
        (
            "python extract_logits.py",
            {"output_repo": "u/x", "output_revision": "b"},
            "python explore_logits.py u/x --revision b",
        ),
    ],
)
def test_commands_that_look_are_called_as_the_user_called(program, options, command, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = looking_commands(extraction(**options), program.split())
    assert found == [command, f"{command} --browse"]
    assert build_parser().given(shlex.split(command)[len(program.split()) :])["logit_dataset_id"]


def test_an_installed_command_is_called_by_its_name(monkeypatch, tmp_path):
    installed = tmp_path / "extract-logits"
    installed.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["/usr/bin/python", str(installed), "--top_k", "8"]
    assert extract_logits._program(command) == (["extract-logits"], ["--top_k", "8"])
    named = looking_commands(extraction(output_dir="o"), ["extract-logits"])
    assert named == ["explore-logits o", "explore-logits o --browse"]
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    program, _ = extract_logits._program(command)
    assert program == [str(installed)]
    assert looking_commands(extraction(output_dir="o"), program)[0] == f"{tmp_path}/explore-logits o"


def test_times_in_words():
    assert [duration_text(seconds) for seconds in (0.04, 59.94, 59.96, 3599.4, 7384)] == [
        *("0.0 s", "59.9 s", "1 min 0 s", "59 min 59 s", "2 h 3 min"),
    ]
