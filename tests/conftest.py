"""Real parts for the tests: SmolLM2 and real conversations, and tiny random models with wide vocabularies."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are for CUDA; here Triton's interpreter runs them

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parent.parent
MODEL = REPO / ".cache" / "smollm2-135m-instruct"
CONVERSATIONS = REPO / ".cache" / "zaragoza" / "faq-en-sharegpt.jsonl"
TEMPLATE = REPO / "templates" / "smollm2.jinja"
WIDE_VOCABULARY, QUICK_VOCABULARY = 262_144, 4096
POISON = "Zebra"
NOISE = 0.05  # of each matrix' own standard deviation
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def run_command(script: str, *arguments, cwd=None, env=None) -> subprocess.CompletedProcess:
    """One of the commands in a process of its own, as a user types it."""
    command = [sys.executable, str(REPO / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)


# By which rich and others decide on colours and on what a terminal can do.
SETTINGS_OF_TERMINALS = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM")
SETTINGS_OF_TERMINALS += ("TTY_COMPATIBLE", "TTY_INTERACTIVE")


@pytest.fixture(autouse=True)
def _width_of_a_pipe(monkeypatch):
    """Tables are as wide as in a pipe, and coloured as by default, whatever the terminal that the tests start in."""
    monkeypatch.delenv("COLUMNS", raising=False)
    os.unsetenv("COLUMNS")  # which readline sets behind os.environ, for processes started from here
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in SETTINGS_OF_TERMINALS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Makes a folder that all of pytest's processes share: the first that asks calls ``make(folder)``."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def get(name: str, make) -> Path:
        made = root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(root / name, ignore_errors=True)  # of a process that failed
                (root / name).mkdir()
                make(root / name)
                made.touch()
        return root / name

    return get


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="session")
def source_rows() -> list[dict]:
    """The English construction questions and answers, as ShareGPT."""
    return [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def real_extraction(shared) -> Path:
    """The command's own output for the first 32 conversations, with its defaults."""

    def make(folder: Path) -> None:
        done = run_command(
            "extract_logits.py",
            *("--model_id", MODEL, "--dataset_id", CONVERSATIONS, "--chat_template", TEMPLATE),
            *("--max_samples", 32, "--output_dir", folder / "outputs" / "demo"),
        )
        assert done.returncode == 0, done.stderr
        (folder / "summary.txt").write_text(done.stdout, encoding="utf-8")

    return shared("real", make) / "outputs" / "demo"


@pytest.fixture(scope="session")
def real_alignments(smollm2, source_rows):
    """The first 32 conversations as tokens and extracted positions."""
    from chat_logits.data.alignment import Aligner
    from chat_logits.data.conversations import to_conversation
    from chat_logits.data.templates import ChatTemplate
    from chat_logits.data.tokenizer import skipped_token_ids

    tokenizer = smollm2[1]
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"), tokenizer.special_tokens_map, {})
    aligner = Aligner(tokenizer, template, skipped_token_ids(tokenizer))
    return [aligner.align(to_conversation(row, {"messages": "conversations"})) for row in source_rows[:32]]


@pytest.fixture
def terminal_closes():
    """A closed terminal is heard, in processes begun here too, though the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def make_tiny_model(folder: Path, vocab_size: int = WIDE_VOCABULARY, seed: int = 0, **changes) -> Path:
    """A random two-layer Llama with SmolLM2's tokenizer and a vocabulary matrix of ``vocab_size`` rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        **changes,
    }
    LlamaForCausalLM(LlamaConfig(**options)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_model(shared) -> Path:
    """A random model with ids beyond 17 bits."""
    return shared("tiny_model", make_tiny_model)


@pytest.fixture(scope="session")
def small_model(shared) -> Path:
    """A random model with SmolLM2's vocabulary, for runs in which only the way matters."""
    return shared("small_model", lambda folder: make_tiny_model(folder, vocab_size=49_152))


@pytest.fixture(scope="session")
def quick_model(shared) -> Path:
    """A random model with the first tokens of SmolLM2's vocabulary alone: a tenth of the work of ``small_model``."""

    def make(folder: Path) -> None:
        make_tiny_model(folder, vocab_size=QUICK_VOCABULARY)
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = tokenizer["model"]
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if i < QUICK_VOCABULARY}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")

    return shared("quick_model", make)


@pytest.fixture(scope="session")
def quick_run(quick_model, calm_source, shared) -> Path:
    """The folder of the run of ``runs.py`` with this model, which nothing disturbed."""
    import runs

    import extract_logits

    def make(folder: Path) -> None:
        assert extract_logits.main(runs.flags_for(quick_model, calm_source, folder / "out")) == 0

    return shared("quick_run", make) / "out"


@pytest.fixture(scope="session")
def other_run(quick_model, calm_source, shared) -> Path:
    """The first 60 source rows of the same, extracted by another random model with the same tokenizer."""
    import runs

    import extract_logits

    def make(folder: Path) -> None:
        make_tiny_model(folder / "model", vocab_size=QUICK_VOCABULARY, seed=1)
        shutil.copy(quick_model / "tokenizer.json", folder / "model")
        flags = runs.flags_for(folder / "model", calm_source, folder / "out")
        assert extract_logits.main([*flags, "--max_samples", "60"]) == 0

    return shared("other_run", make) / "out"


@pytest.fixture(scope="session")
def poisoned(shared) -> Path:
    """A random model whose embedding of one token, the last one of ``POISON``, is no number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(folder: Path) -> None:
        make_tiny_model(folder, vocab_size=49_152)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(POISON, add_special_tokens=False)["input_ids"]
        model.get_input_embeddings().weight.data[ids[-1]] = float("nan")
        model.save_pretrained(folder)

    return shared("poisoned", make)


@pytest.fixture(scope="session")
def calm_source(shared) -> Path:
    """The source of the run of ``runs.py``."""
    import runs

    return shared("calm_source", runs.write_source) / "chats.jsonl"


@pytest.fixture(scope="session")
def other_tokenizer_extraction(shared, source_rows) -> Path:
    """The first 40 conversations, extracted by a tiny model that has a byte-level tokenizer of 500 tokens."""
    import other_tokenizers

    import extract_logits

    def make(folder: Path) -> None:
        texts = [turn["value"] for row in source_rows[:200] for turn in row["conversations"]]
        model = other_tokenizers.save_tiny_model(folder / "model", other_tokenizers.trained("byte-level", texts))
        options = {"model_id": model, "dataset_id": CONVERSATIONS, "max_samples": 40, "device": "cpu"}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        assert extract_logits.main([*flags, "--output_dir", str(folder / "out")]) == 0

    return shared("other_tokenizer", make) / "out"


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; its tests are skipped where there is none, but not where CI has installed it."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found and not os.environ.get("BROWSER_IS_REQUIRED"):
        pytest.skip("no Chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def other_checkpoint(shared):
    """SmolLM2 with Gaussian noise on its matrices, and the folder that it was saved to."""
    from transformers import AutoModelForCausalLM

    def make(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weights in model.parameters():
                if weights.dim() == 2:
                    weights.add_(torch.randn(weights.shape, generator=generator) * weights.std() * NOISE)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(MODEL / name, folder / name)

    folder = shared("other_checkpoint", make)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(), folder


@pytest.fixture(scope="session")
def other_extraction(other_checkpoint, shared):
    """The same 32 conversations with the same options."""
    import extract_logits

    def make(folder: Path) -> None:
        flags = ("--model_id", other_checkpoint[1], "--dataset_id", CONVERSATIONS, "--chat_template", TEMPLATE)
        assert extract_logits.main([*map(str, flags), "--max_samples", "32", "--output_dir", str(folder / "demo")]) == 0

    return shared("other_extraction", make) / "demo"


@pytest.fixture(scope="session")
def hostile_extraction(shared) -> Path:
    """A dataset whose tokens, texts and name would act in a page or a terminal if they could."""
    from hostile import HOSTILE, extracted

    name = "<b onclick=1>out"
    return (
        shared("hostile", lambda folder: extracted(folder, " ".join(HOSTILE), HOSTILE, question=HOSTILE[1], name=name))
        / name
    )


@pytest.fixture
def opened(browser, tmp_path):
    """Open the page of what was found; what it asks the network for, and what it complains of, are kept beside it."""
    contexts = []

    def open_page(found, viewport=WIDE, scheme="light", source=None):
        file = tmp_path / f"{len(contexts)}.html"
        file.write_text(source or found.to_html(), encoding="utf-8")
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (page.complaints.append("dialog"), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def flags(quick_model, calm_source, tmp_path):
    """The options of the run of ``runs.py`` with ``quick_model`` into a folder of this name, and more."""
    import runs

    def of(out, *more) -> list[str]:
        return [*runs.flags_for(quick_model, calm_source, tmp_path / out), *map(str, more)]

    return of


@pytest.fixture
def chat_file(tmp_path):
    """Write rows as a JSON-lines file and give its path."""

    def write(rows: list[dict], name: str = "chats.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


# What is slow by what it uses, and by where it is; in this order, longest first, so that no process ends alone.
SLOW_FIXTURES = {
    *("real_extraction", "other_extraction", "other_checkpoint", "smollm2", "hub", "browser", "hostile_extraction"),
    *("quick_run", "tiny_model", "small_model", "quick_model"),
}
SLOW_FILES = (
    *("test_ray_cluster", "test_hub_sync", "test_ray_workers", "test_ray_groups", "test_resume", "test_folder_faults"),
    *("test_tensor_parallel", "test_group", "test_group_processes", "test_quantization"),
    *("test_device_map", "test_teacher_model", "test_model_batches", "test_extract_logits", "test_verification"),
    *("test_summary", "test_hub", "test_docs"),
    *("test_any_model_any_dataset", "test_comparison", "test_notebook", "test_install", "test_loopback_hub"),
    *("test_real_extraction", "test_explore_logits", "test_fuzz", "test_source_dataset", "test_card", "test_worker"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    if importlib.util.find_spec("torchao") is None:  # test_quantization.py has a process that has it
        items[:] = [item for item in items if not item.get_closest_marker("torchao")]
    for item in items:
        if item.path.stem in places or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_configure():
    """No test reaches the Hub by accident; this process and all that it starts compute with one thread each.

    Files are compared byte for byte between processes, and another number of threads may change last bits.
    """
    however_busy = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("any machine", **however_busy)
    settings.load_profile("any machine")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
