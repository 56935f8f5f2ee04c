"""README and docs/ say what is so: their commands and snippets run, their options, files and links exist."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import doc_tables
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MODEL, REPO, TEMPLATE
from doc_session import DocSession, commands_in
from loopback_hub import LoopbackHub

from chat_logits.cli import explore_options, extract_options
from chat_logits.cli.parser import read_options
from chat_logits.extraction.config import ExtractConfig

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
README_BYTES = 9_000

# The Hub that the pages speak of has a small random model under each of these names, and these rows.
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct",)
DATASET = "MegaScience/MegaScience"
ROWS = [
    {"question": f"What is {i} and {i + 1}?", "answer": f"Taken together, they are {2 * i + 1}, as {i} is {i}."}
    for i in range(12)
]

# Commands that no test can run as they stand, and what is done in their place.
NOT_RUN = {
    "pip install": "needs a network; test_install.py installs a wheel and the clone without one",
    "make": "downloads, or runs this test itself; the Makefile must have the target",
    "ray start": "makes this machine a cluster's head; parsed by Ray's own command",
}
# Options that need what a test does not have; such commands are parsed, and their options checked as a run does.
NEEDS = {
    "--num_workers": "as many GPUs; test_ray_workers.py runs workers on CPUs",
    "--max_memory": "two GPUs; test_device_map.py spreads a model over pretended ones",
    "--gguf_file": "a GGUF file on the Hub; demo/fetch.py loads one",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``number`` counts them."""

    page: Path
    number: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(page, number, language, text) for number, (language, text) in enumerate(found)]


BLOCKS = {page.name: blocks_of(page) for page in PAGES}


# --- commands and snippets ---


@pytest.fixture(scope="module")
def hub(small_model):
    with LoopbackHub() as hub:
        for name in MODELS:
            hub.add_repo("model", name, files={path.name: path.read_bytes() for path in small_model.iterdir()})
        table = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ROWS), table)
        hub.add_repo("dataset", DATASET, files={"data/train.parquet": table.getvalue().to_pybytes()})
        yield hub


@pytest.fixture(scope="module")
def session(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    session = DocSession({**hub.environment(home), "PYTHONPATH": str(REPO)})
    yield session
    session.close()


@pytest.fixture(scope="module")
def outputs(session, tmp_path_factory) -> Path:
    """What the pages take for granted: datasets in outputs/demo, as `make demo` begins, and in outputs/other."""
    folder = tmp_path_factory.mktemp("made")
    (folder / ".cache").symlink_to(MODEL.parent)
    command = ["extract-logits", "--model_id", ".cache/smollm2-135m-instruct", "--max_samples", "4"]
    command += ["--dataset_id", ".cache/zaragoza/faq-en-sharegpt.jsonl", "--device", "cpu"]
    for options in (["--output_dir", "outputs/demo"], ["--output_dir", "outputs/other", "--top_k", "16"]):
        done = session.command(command + options, folder)
        assert done.status == 0, done.err
    return folder / "outputs"


def folder_for(page: str, outputs: Path, tmp_path: Path) -> Path:
    """A folder as a reader of the page has it."""
    folder = tmp_path / page
    shutil.copytree(outputs, folder / "outputs")
    (folder / ".cache").symlink_to(MODEL.parent)
    (folder / "templates").symlink_to(REPO / "templates")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "path" / "to").mkdir(parents=True)
    shutil.copy(TEMPLATE, folder / "path" / "to" / "custom_template.jinja")
    return folder


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_and_snippets_of_a_page_run_in_its_order(page, hub, session, outputs, tmp_path):
    folder = folder_for(page, outputs, tmp_path)
    shown = ""
    if page not in ("README.md", "extracting.md"):  # those make it themselves
        make = ["extract-logits", "--model_id", MODELS[0], "--dataset_id", DATASET]
        assert session.command([*make, "--output_repo", "user/my-logits-dataset"], folder).status == 0
    for block in BLOCKS[page]:
        name = f"{page}, block {block.number}"
        if block.language == "bash":
            for words in commands_in(block.text):
                shown = run_or_check(words, session, folder) or shown
        elif block.language == "python":
            done = session.snippet(block.text, page, folder)
            assert done.status == 0, f"{name}\n{done.err}"
            shown = done.out or shown
        elif block.language == "yaml":
            (folder / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text, encoding="utf-8")
    hub.remove_repo("dataset", "user/my-logits-dataset")


def run_or_check(words: list[str], session: DocSession, folder: Path) -> str:
    """Run a command and give what it prints, or check it in another way, as ``NOT_RUN`` and ``NEEDS`` say."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.M), words
        return ""
    if words[:2] == ["pip", "install"]:
        return ""
    if words[:2] == ["ray", "start"]:
        from ray.scripts.scripts import start

        start.make_context("start", words[2:])
        return ""
    if set(words) & set(NEEDS):
        given = extract_options.build_parser().given(words[1:])
        ExtractConfig(**read_options(ExtractConfig, given))
        return ""
    done = session.command(words, folder)
    assert done.status == 0, f"{words}\n{done.err}"
    return done.out


def test_what_is_not_run_is_on_the_list():
    commands = [
        words for blocks in BLOCKS.values() for b in blocks if b.language == "bash" for words in commands_in(b.text)
    ]
    others = {" ".join(words[:2]) for words in commands if words[0] not in ("extract-logits", "explore-logits")}
    assert all(any(name.startswith(known) for known in NOT_RUN) for name in others), others


def test_blocks_are_of_the_kinds_that_are_checked():
    assert {b.language for blocks in BLOCKS.values() for b in blocks} <= {"bash", "python", "yaml", "text", "jinja", ""}


# --- what is shown ---


NUMBER = re.compile(r"\d+\.\d+|\de-\d+")


def lines_like(line: str, output: str) -> list[str]:
    """The lines of an output that differ from this one in the last digits of numbers alone."""
    numbers = [float(number) for number in NUMBER.findall(line)]
    alike = [
        other for other in output.splitlines() if NUMBER.sub("#", other.rstrip()) == NUMBER.sub("#", line.rstrip())
    ]
    return [
        other
        for other in alike
        if [float(number) for number in NUMBER.findall(other)] == pytest.approx(numbers, abs=0.015, rel=0.01)
    ]


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if any(b.language == "text" for b in blocks)])
def test_output_is_shown_as_it_is(page, session, outputs):
    folder = outputs.parent
    source = ["--model_id", ".cache/smollm2-135m-instruct", "--dataset_id", ".cache/zaragoza/faq-en-sharegpt.jsonl"]
    printed = [
        session.command(["explore-logits", "outputs/demo", "--sample_index", "0"], folder),
        session.command(["extract-logits", *source, "--preview", "1"], folder),
    ]
    assert [done.status for done in printed] == [0, 0]
    output = "\n".join(done.out for done in printed)
    for block in BLOCKS[page]:
        if block.language == "text":
            for line in block.text.splitlines():
                assert line == "…" or lines_like(line, output), f"{page}: {line}\nis not in\n{output}"


# --- what is named ---


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", doc_tables.PAGES)
def test_tables_of_options_are_the_options(name):
    page = text_of(doc_tables.PAGES[name])
    assert page == doc_tables.with_tables(page, name), "python tests/support/doc_tables.py writes them anew"
    assert page.count("\n| `--") >= 15


def test_options_that_are_named_exist():
    known = {"--head", "--port", "--address"}  # of ray start
    for parser in (extract_options.build_parser(), explore_options.build_parser()):
        known |= {option for action in parser._actions for option in action.option_strings}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text_of(page)))
        spelled = {"--" + name[2:].replace("-", "_") for name in named}
        assert spelled <= known, page.name


def test_files_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:chat_logits|benchmarks|demo|tests|docs|templates)/[\w/.-]+\.\w+)", text_of(page)):
            assert (REPO / name).is_file(), f"{page.name}: {name}"
        for name in re.findall(r"`(chat_logits(?:\.\w+)+)", text_of(page)):
            path = REPO / name.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.parent.with_suffix(".py").is_file(), f"{page.name}: {name}"


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in [*PAGES, REPO / "FORMAT.md", REPO / "benchmarks" / "RESULTS.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(path), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_bytes()) <= README_BYTES


def test_every_template_is_in_the_table_and_none_that_is_not_there():
    named = re.findall(r"`([a-z]\w+)`", "".join(re.findall(r"^\|.*\|$", text_of(REPO / "docs" / "templates.md"), re.M)))
    assert sorted(named) == sorted(path.stem for path in (REPO / "templates").glob("*.jinja"))
    assert f"one of the {len(named)} [templates]" in text_of(REPO / "README.md")


def test_every_module_has_its_place_in_the_table_of_rooms():
    page = text_of(REPO / "docs" / "architecture.md")
    modules = {
        path.relative_to(REPO).as_posix() for path in (REPO / "chat_logits").rglob("*.py") if path.stem != "__init__"
    }
    named = {
        f"chat_logits/{room}{name}.py" if room else f"chat_logits/{name}.py"
        for room, names in re.findall(r"^\| `chat_logits/(\w+/)?` \|.*?\|(.*?)\|", page, re.M)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert named == modules


def test_the_jinja_example_is_a_template_with_spans(smollm2):
    from chat_logits.data.templates import ChatTemplate

    (example,) = (b.text for b in BLOCKS["templates.md"] if b.language == "jinja")
    template = ChatTemplate(example, smollm2[1].special_tokens_map, {})
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text, spans = template.render(conversation)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert [text[start:end] for start, end in spans] == ["Hello.<|im_end|>"]
