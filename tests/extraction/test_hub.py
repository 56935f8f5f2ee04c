"""Extraction to the Hub and exploration from it, through the real clients against a Hub on loopback."""

import json
import math
import subprocess
import sys

import pytest
from conftest import REPO, TEMPLATE, run_command
from hub_faults import Fault
from lives import Server
from loopback_hub import LoopbackHub

from chat_logits.storage.dataset import open_dataset

ROWS = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}, of course."} for i in range(5)]
SHOW = """
import datasets, json, sys
from explore_logits import execute_analysis
from chat_logits.storage.dataset import open_dataset
stored = open_dataset("user/logits")
tokens = execute_analysis("user/logits", sample_index=3)
loaded = datasets.load_dataset("user/logits", split="train", revision=stored.revision)
rows = [dict(row, **{key: row[key].hex() for key in row if isinstance(row[key], bytes)}) for row in loaded]
print("RESULT", json.dumps({
    "revision": stored.revision,
    "read": stored.read_row(3)["source_index"],
    "extracted": [token.text for token in tokens if token.status == "extracted"],
    "rows": rows,
}))
"""


@pytest.fixture(scope="module")
def hub(small_model):
    with LoopbackHub() as hub:
        files = {path.name: path.read_bytes() for path in small_model.iterdir()}
        commits = {"model": hub.add_repo("model", "user/tiny-chat", files=files)}
        source = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        commits["dataset"] = hub.add_repo("dataset", "user/questions", files={"train.jsonl": source})
        for kind, name in (("model", "user/tiny-chat"), ("dataset", "user/questions")):
            hub.add_repo(kind, f"{name}-gated", files=hub.files(kind, name), gated=True)
            hub.add_repo(kind, f"{name}-private", files=hub.files(kind, name), private=True)
        yield hub, commits


@pytest.fixture(scope="module")
def workplace(hub, tmp_path_factory):
    """A folder to work in, and what starts processes there, with the loopback Hub as theirs."""
    folder = tmp_path_factory.mktemp("hub")
    env = {**hub[0].environment(folder / "home"), "PYTHONPATH": str(REPO)}
    with Server(env, tmp_path_factory.mktemp("server")) as server:
        yield folder, server


EXTRACT, EXPLORE = (
    "import extract_logits; extract_logits.command()",
    "import explore_logits; explore_logits.command()",
)
NO_TOKEN = {"HF_TOKEN": None}


def extract(workplace, *options, **more):
    """The extraction of the Hub's own model and dataset, with these options, in a process of its own."""
    sources = ("--model_id", "user/tiny-chat", "--dataset_id", "user/questions", "--chat_template", TEMPLATE)
    return workplace[1].run(EXTRACT, *sources, *options, cwd=workplace[0], **more)


@pytest.fixture(scope="module")
def pushed(hub, workplace):
    """What the README's command does with --output_repo alone: its folder, output, and requests by path."""
    folder, _ = workplace
    before = len(hub[0].requests)
    done = extract(workplace, "--output_repo", "user/logits", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "logits", done.stdout, [request.path for request in hub[0].requests[before:]]


IN_PYTHON = """
import sys
from huggingface_hub import constants, get_session
from huggingface_hub.utils import are_progress_bars_disabled, logging
from chat_logits import ExtractConfig, extract
def state():
    return constants.HF_HUB_DISABLE_XET, logging.get_verbosity(), get_session().timeout, are_progress_bars_disabled()
constants.HF_HUB_DISABLE_XET = False
before = state()
config = dict(dataset_id="user/questions", chat_template=sys.argv[1], device="cpu", output_repo="user/in-python")
print(extract(ExtractConfig(model_id="user/tiny-chat", **config)).url)
assert state() == before, (state(), before)
try:
    extract(ExtractConfig(model_id="user/tiny-chat", top_k=3, **config))
except Exception as error:
    print(error)
assert state() == before, (state(), before)
"""


def test_an_extraction_from_python_leaves_the_hubs_client_as_it_was(workplace, tmp_path):
    done = workplace[1].run(IN_PYTHON, TEMPLATE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    url, refused = done.stdout.splitlines()
    assert url.endswith("/datasets/user/in-python/tree/main") and "top_k: 64 there, 3 here" in refused


def test_the_repository_holds_the_folders_files(hub, pushed):
    folder, (hub, _) = pushed[0], hub
    local = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    remote = hub.files("dataset", "user/logits")
    assert set(remote) - set(local) <= {".gitattributes"}
    del local[".lock"], local[".checked.json"]
    assert {name: remote[name] for name in local} == local
    assert set(local) == {"README.md", "extraction.json", "shards.json", "data/00000/train-00000.parquet"}


def test_revisions_are_the_commits(hub, pushed):
    extraction = json.loads((pushed[0] / "extraction.json").read_text())
    assert extraction["model_revision"] == hub[1]["model"]
    assert extraction["dataset_revision"] == hub[1]["dataset"]


def test_a_new_run_asks_once_which_commits_it_reads(pushed):
    assert [pushed[2].count(f"/api/{repo}") for repo in ("models/user/tiny-chat", "datasets/user/questions")] == [1, 1]


def test_what_comes_back_is_what_was_written(pushed, workplace):
    folder, server = workplace
    done = server.run(SHOW, cwd=folder)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    local = open_dataset(str(pushed[0]))
    expected = [local.read_row(i) for i in range(local.num_rows)]
    for row, loaded in zip(expected, result["rows"], strict=True):
        plain = {key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()}
        assert loaded == json.loads(json.dumps(plain))
    assert result["read"] == 3 and len(result["revision"]) == 40
    assert "".join(result["extracted"]) == ROWS[3]["answer"]
    assert "Detailed Token Analysis:" in done.stdout


def test_another_run_replaces_the_rows_of_a_repository(hub, workplace):
    """Shards of a longer run must not stay beside those of a shorter one."""
    folder, _ = workplace
    for flags in ((), ("--max_samples", 2, "--overwrite")):
        done = extract(workplace, "--output_repo", "user/again", "--output_dir", "again", *flags)
        assert done.returncode == 0, done.stderr
    local = (folder / "again" / "data" / "00000" / "train-00000.parquet").read_bytes()
    remote = hub[0].files("dataset", "user/again")
    assert {name: data for name, data in remote.items() if name.startswith("data/")} == {
        "data/00000/train-00000.parquet": local
    }


def test_a_streamed_hub_dataset_gives_the_same_rows(pushed, workplace):
    folder, _ = workplace
    done = extract(workplace, "--streaming", "--output_dir", "streamed", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    streamed, whole = open_dataset(str(folder / "streamed")), open_dataset(str(pushed[0]))
    assert streamed.num_rows == whole.num_rows == len(ROWS)
    assert all(streamed.read_row(i) == whole.read_row(i) for i in range(len(ROWS)))
    assert streamed.manifest.dataset_revision == whole.manifest.dataset_revision


@pytest.mark.parametrize(
    ("options", "token", "words"),
    [
        ({"model_id": "user/nothing"}, True, ["model user/nothing", "404", "HF_TOKEN"]),
        ({"dataset_id": "user/nothing"}, True, ["dataset user/nothing", "404", "HF_TOKEN"]),
        ({"model_id": "user/tiny-chat-gated"}, True, ["user/tiny-chat-gated: gated (403)", "HF_TOKEN"]),
        ({"dataset_id": "user/questions-gated"}, True, ["user/questions-gated", "gated", "HF_TOKEN"]),
        ({"model_id": "user/tiny-chat-private"}, False, ["user/tiny-chat-private", "401", "HF_TOKEN"]),
        ({"dataset_id": "user/questions-private"}, False, ["user/questions-private", "401", "HF_TOKEN"]),
        ({"model_revision": "v9"}, True, ["model user/tiny-chat: no such revision"]),
        ({"dataset_revision": "v9"}, True, ["dataset user/questions: no such revision"]),
        ({"split": "test"}, True, ["--split test", "train"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_the_hub_refuses_is_explained(workplace, options, token, words):
    folder, server = workplace
    defaults = {"model_id": "user/tiny-chat", "dataset_id": "user/questions", "output_dir": "refused"}
    pairs = [part for pair in {**defaults, "chat_template": TEMPLATE, **options}.items() for part in pair]
    command = [f"--{part}" if i % 2 == 0 else part for i, part in enumerate(pairs)]
    done = server.run(EXTRACT, *command, cwd=folder, env=None if token else NO_TOKEN)
    message = done.stderr[done.stderr.rindex("error: ") :]
    assert done.returncode in (1, 2) and len(message.splitlines()) <= 2
    assert all(word in message for word in words), message
    assert not (folder / "refused").exists()


def test_a_push_that_would_be_refused_is_refused_before_the_model_loads(workplace):
    folder, _ = workplace
    done = extract(workplace, "--output_repo", "user/forbidden", "--max_samples", 2, env=NO_TOKEN)
    assert done.returncode == 1
    assert "--output_repo user/forbidden" in done.stderr and "HF_TOKEN" in done.stderr
    assert "Loading" not in done.stderr and not (folder / "outputs" / "forbidden").exists()


def test_a_hub_that_is_not_there_stops_nothing_but_the_push(small_model, chat_file, tmp_path, hub):
    env = {**hub[0].environment(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_command(
        "extract_logits.py",
        *("--model_id", small_model, "--dataset_id", chat_file(ROWS), "--chat_template", TEMPLATE),
        *("--output_repo", "user/later", "--max_samples", 2),
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 1, done.stderr
    assert "Rows go to outputs/later, and from there to the Hub as soon as it answers." in done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "error: --output_repo user/later: the Hub cannot be reached at HF_ENDPOINT http://127.0.0.1:9",
        "1 of 1 shards are not on the Hub yet; all are in outputs/later. The same command pushes what is missing, and "
        "computes nothing again.",
    ]
    assert open_dataset(str(tmp_path / "outputs" / "later")).num_rows == 2


def test_a_dataset_without_extraction_json_is_no_logit_dataset(workplace):
    folder, server = workplace
    done = server.run(EXPLORE, "--logit_dataset_id", "user/questions", cwd=folder)
    assert done.returncode == 1
    assert "user/questions: no extraction.json in it, so it is not a logit dataset" in done.stderr


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("refuse", "/resolve/", status=501, times=math.inf), "the Hub fails (501)"),
        (Fault("refuse", "info", status=500, times=math.inf), "the Hub fails (500)"),
        (Fault("stray", "info"), "HTML instead of the Hub's JSON"),
        (
            Fault("refuse", "info", status=403, headers={"X-Error-Message": "Your plan has ended."}),
            "the Hub refuses (403: Your plan has ended.)",
        ),
    ],
    ids=["a file", "the repository", "a page", "a sentence"],
)
def test_exploring_tells_the_hubs_trouble_as_the_hubs(hub, pushed, workplace, tmp_path, fault, words):
    hub, repo = hub[0], f"user/trouble-{fault.kind}-{fault.status}"  # of which nothing is in the cache
    hub.add_repo("dataset", repo, files=hub.files("dataset", f"user/{pushed[0].name}"))
    hub.inject(fault)
    done = workplace[1].run(EXPLORE, repo, cwd=tmp_path)
    hub.clear_faults()
    assert done.returncode == 1
    assert f"error: dataset {repo}: {words}" in done.stderr and "logit dataset" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_what_one_process_uploads_another_commits_and_the_file_may_be_gone(tmp_path):
    """A shard, which goes to the large files, and a file that a branch keeps in git itself."""
    code = """
import pathlib, pickle, sys
from chat_logits.storage.repository import Repository
files = [pathlib.Path(name) for name in sys.argv[1:]]
uploads = {file.name: Repository("user/parts", None, False).upload(file.name, file) for file in files}
for file in files:
    file.unlink()
sys.stdout.buffer.write(pickle.dumps(uploads))
"""
    contents = {"one.parquet": b"PAR1" * 1000, "two.txt": b"in git"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with LoopbackHub() as hub:
        hub.add_repo("dataset", "user/parts", files={})
        env = hub.environment(tmp_path / "home")
        names = [str(tmp_path / name) for name in contents]
        done = subprocess.run([sys.executable, "-c", code, *names], cwd=REPO, env=env, capture_output=True, check=True)
        assert len(done.stdout) < 3000, "what is uploaded does not come back"
        commit = """
import pickle, sys
from chat_logits.storage.repository import Repository
repository = Repository("user/parts", None, False)
repository.commit("Both", pickle.load(sys.stdin.buffer), [], repository.look().head)
"""
        subprocess.run([sys.executable, "-c", commit], cwd=REPO, env=env, input=done.stdout, check=True)
        there = hub.files("dataset", "user/parts")
    assert {name: there[name] for name in contents} == contents


def test_an_upload_of_what_a_commit_has_deleted_meanwhile_is_committed(tmp_path):
    """As where a run is replaced by the same one: its shards have the bytes of those that the first commit deletes."""
    code = """
import pathlib, sys
from chat_logits.storage.repository import Repository
repository, file = Repository("user/again", None, False), pathlib.Path(sys.argv[1])
upload = repository.upload("data/one.parquet", file)
head = repository.commit("Another", {"data/two.parquet": file}, ["data/one.parquet"], repository.look().head)
repository.commit("The same", {"data/one.parquet": upload}, [], head)
"""
    (tmp_path / "one.parquet").write_bytes(b"PAR1" * 1000)
    with LoopbackHub() as hub:
        hub.add_repo("dataset", "user/again", files={"extraction.json": b"{}"})
        first = 'repository.commit("First", {"data/one.parquet": file}, [], repository.look().head)'
        begin = code.partition("upload =")[0] + first
        env = hub.environment(tmp_path / "home")
        for each in (begin, code):
            done = subprocess.run(
                [sys.executable, "-c", each, tmp_path / "one.parquet"],
                cwd=REPO,
                env=env,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        there = hub.files("dataset", "user/again")
    assert there["data/one.parquet"] == there["data/two.parquet"] == b"PAR1" * 1000
