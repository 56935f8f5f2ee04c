"""The commands and snippets of README and docs/ run, and print what the pages show."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CONVERSATIONS, MODEL, TEMPLATE
from doc_pages import BLOCKS, REPO, Block, commands_in
from doc_session import DocSession
from loopback_hub import LoopbackHub

from chat_logits.cli import explore_options, extract_options
from chat_logits.cli.explore_options import ExploreOptions, check_options
from chat_logits.cli.parser import read_options
from chat_logits.extraction.config import ExtractConfig

# The Hub that the pages speak of has a small random model of this name, a dataset of these rows, and the one they push.
HUB_MODEL, HUB_DATASET, PUSHED = "Qwen/Qwen2.5-0.5B-Instruct", "MegaScience/MegaScience", "user/my-logits-dataset"
ROWS = [
    {"question": f"What is {i} and {i + 1}?", "answer": f"Taken together, they are {2 * i + 1}, as {i} is {i}."}
    for i in range(12)
]
PUSHING = ("README.md", "extracting.md")  # pages that push it themselves

# Commands that no test can run as they stand, and what is done in their place.
NOT_RUN = {
    "pip install": "needs a network; test_install.py installs a wheel and the clone without one",
    "make": "downloads, or runs this test itself; the Makefile must have the target",
    "ray start": "makes this machine a cluster's head; parsed by Ray's own command",
}
# Options that need what a test does not have: such commands are parsed, and their options checked as a run does.
NOT_HERE = {
    "--num_workers": "as many GPUs; test_ray_workers.py runs workers on CPUs",
    "--tensor_parallel": "as many GPUs; test_tensor_parallel.py runs processes on CPUs",
    "--max_memory": "two GPUs; test_device_map.py spreads a model over pretended ones",
    "--gguf_file": "a GGUF file on the Hub; demo/fetch.py loads one",
}
# A table as a terminal of the width of these pages has it; a pipe gets longer lines.
TABLE = """
import sys
from rich.console import Console
from explore_logits import execute_analysis
analysis = execute_analysis("outputs/demo", sample_index=0, quiet=True)
analysis.print(Console(file=sys.stdout, width=118, force_terminal=True, color_system=None))
"""
PLAN = """
import os
import extract_logits
os.environ["COLUMNS"] = "118"
words = "--model_id .cache/smollm2-135m-instruct --dataset_id .cache/zaragoza/faq-en-sharegpt.jsonl --dtype bfloat16"
status = extract_logits.main([*words.split(), "--plan", "--plan_for", "h100-80gb"])
del os.environ["COLUMNS"]
assert status == 0
"""
NUMBER = re.compile(r"\d+\.\d+|\de-\d+")


@pytest.fixture(scope="module")
def hub(small_model):
    with LoopbackHub() as hub:
        hub.add_repo("model", HUB_MODEL, files={path.name: path.read_bytes() for path in small_model.iterdir()})
        table = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ROWS), table)
        hub.add_repo("dataset", HUB_DATASET, files={"data/train.parquet": table.getvalue().to_pybytes()})
        yield hub


@pytest.fixture(scope="module")
def session(hub, tmp_path_factory):
    session = DocSession({**hub.environment(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(REPO)})
    yield session
    session.close()


@pytest.fixture
def folder(real_extraction, other_extraction, other_tokenizer_extraction, tmp_path) -> Path:
    """A folder as a reader of the pages has it."""
    shutil.copytree(real_extraction, tmp_path / "outputs" / "demo")
    shutil.copytree(other_extraction, tmp_path / "outputs" / "other")
    shutil.copytree(other_tokenizer_extraction, tmp_path / "outputs" / "of_another_family")
    (tmp_path / ".cache").symlink_to(MODEL.parent)
    (tmp_path / "templates").symlink_to(REPO / "templates")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copy(TEMPLATE, tmp_path / "path" / "to" / "custom_template.jinja")
    return tmp_path


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_a_pages_commands_and_snippets_run_in_their_order(page, hub, session, folder):
    if page not in PUSHING:
        make = ["extract-logits", "--model_id", HUB_MODEL, "--dataset_id", HUB_DATASET, "--output_repo", PUSHED]
        assert session.command(make, folder).status == 0
    for block in BLOCKS[page]:
        run_block(block, session, folder)
    hub.remove_repo("dataset", PUSHED)


def run_block(block: Block, session: DocSession, folder: Path) -> None:
    if block.language == "bash":
        for words in commands_in(block.text):
            run_or_check(words, session, folder)
    elif block.language == "python":
        done = session.snippet(block.text, block.page.name, folder)
        assert done.status == 0, f"{block.text}\n{done.err}"
    elif block.language == "yaml":  # its first line is a comment with the file's name
        (folder / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text, encoding="utf-8")


def run_or_check(words: list[str], session: DocSession, folder: Path) -> None:
    """Run a command, or check it in another way, as ``NOT_RUN`` and ``NOT_HERE`` say; of an array, the first task's."""
    words = [word.replace("$SLURM_ARRAY_TASK_ID", "1") for word in words]
    if words[:2] == ["pip", "install"]:
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.M), words
    elif words[:2] == ["ray", "start"]:
        from ray.scripts.scripts import start

        start.make_context("start", words[2:])
    elif "--browse" in words:  # serves until it is stopped; tests/browse does that
        check_options(ExploreOptions(**read_options(ExploreOptions, explore_options.build_parser().given(words[1:]))))
    elif set(words) & set(NOT_HERE):
        ExtractConfig(**read_options(ExtractConfig, extract_options.build_parser().given(words[1:])))
    else:
        done = session.command(words, folder)
        assert done.status == 0, f"{words}\n{done.err}"


def is_printed(line: str, output: str) -> bool:
    """Whether a line is in the output: its "…" stand for anything, and last digits of numbers may differ."""
    pieces = ["[^\n]*".join(map(re.escape, piece.split("…"))) for piece in NUMBER.split(line.rstrip())]
    numbers = [float(number) for number in NUMBER.findall(line)]
    candidates = re.findall(rf"^{f'({NUMBER.pattern})'.join(pieces)} *$", output, re.M) if numbers else ()
    if not numbers:
        return bool(re.search(rf"^{pieces[0]} *$", output, re.M))
    found = [(one,) if isinstance(one, str) else one for one in candidates]
    return any([float(number) for number in one] == pytest.approx(numbers, abs=0.015, rel=0.01) for one in found)


def test_a_line_with_other_digits_is_told_from_one_with_other_numbers():
    assert is_printed('"a"(0.76) | 1.48', 'x\n"a"(0.77) | 1.48  \n')
    assert is_printed('prompt  "<|im_s…"', 'prompt  "<|im_start|> and so on"')
    assert not is_printed('"a"(0.76) | 1.48', '"a"(0.86) | 1.48')
    assert not is_printed('"b"(0.76) | 1.48', '"a"(0.76) | 1.48')


def test_output_in_the_pages_is_what_is_printed(session, folder):
    preview = ["extract-logits", "--model_id", MODEL, "--dataset_id", CONVERSATIONS, "--preview", "1"]
    printed = [session.snippet(code, "table", folder) for code in (TABLE, PLAN)]
    printed.append(session.command([*map(str, preview)], folder))
    assert [done.status for done in printed] == [0, 0, 0], printed
    output = "\n".join(done.out + done.err for done in printed)
    lines = [line for blocks in BLOCKS.values() for b in blocks if b.language == "text" for line in b.text.splitlines()]
    assert len(lines) > 15
    for line in lines:
        assert is_printed(line, output), f"{line}\nis not in\n{output}"


def test_what_is_not_run_is_on_the_list():
    commands = [
        words for blocks in BLOCKS.values() for b in blocks if b.language == "bash" for words in commands_in(b.text)
    ]
    ours = ("extract-logits", "explore-logits", "export-targets", "train-student")
    others = {" ".join(words) for words in commands if words[0] not in ours}
    assert all(any(command.startswith(known) for known in NOT_RUN) for command in others), others
    assert {b.language for blocks in BLOCKS.values() for b in blocks} <= {"bash", "python", "yaml", "text", "jinja"}


def test_the_jinja_example_is_a_template_with_spans(smollm2):
    from chat_logits.data.templates import ChatTemplate

    (example,) = (b.text for b in BLOCKS["templates.md"] if b.language == "jinja")
    template = ChatTemplate(example, smollm2[1].special_tokens_map, {})
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text, spans = template.render(conversation)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert [text[start:end] for start, end in spans] == ["Hello.<|im_end|>"]
