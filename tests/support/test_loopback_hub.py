"""The stand-in Hub is only worth its tests if the real clients cannot tell it from the Hub.

One subprocess (this file, run as a script under the hub's environment) drives the clients through
everything and writes down what it saw; the tests compare that with what the hub holds. What goes
wrong on demand is met by huggingface_hub in this process, whose waits between retries take no time.
"""

import hashlib
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_faults import KINDS, Fault
from loopback_hub import SIGNATURE, TOKEN, LoopbackHub

# huggingface_hub sends uploads in a way that its own HTTP library has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

DATA, MODEL, SHARD = "user/rows", "user/tiny", "data/train 0.parquet"
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*
---
"""
SECRET = {"config.json": b"{}"}


def write_dataset(folder: Path, rows: int) -> dict[str, str]:
    """A card, a JSON file, an empty file and a shard; gives the sha256 of each."""
    import pyarrow
    import pyarrow.parquet

    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(CARD)
    (folder / "stats.json").write_text(json.dumps({"rows": rows}))
    (folder / "empty.txt").touch()
    columns = {"x": list(range(rows)), "text": [f"row {i}" for i in range(rows)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / SHARD)
    return sums(folder)


def sums(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def publish(api, home: Path) -> dict:
    """Two versions of a dataset, an upload of nothing new, then a deletion."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    where = {"repo_id": DATA, "repo_type": "dataset"}
    created = [api.create_repo(**where, exist_ok=True).repo_id for _ in range(2)]
    seen = {"created": created, "sums": [], "shas": []}
    for rows in (1000, 2000):
        seen["sums"].append(write_dataset(home / "up", rows))
        seen["shas"].append(api.upload_folder(**where, folder_path=home / "up").oid)
    seen["unchanged"] = api.upload_folder(**where, folder_path=home / "up").oid
    operations = [
        CommitOperationAdd("deep/er/blob.bin", b"\0" * 100),
        CommitOperationAdd("deep/note.txt", b"note"),
        CommitOperationDelete("stats.json"),
    ]
    parent = {"parent_commit": seen["shas"][-1]}
    seen["edited"] = api.create_commit(**where, **parent, operations=operations, commit_message="e")
    seen["edited"] = seen["edited"].oid
    seen["deep"] = [e.path for e in api.list_repo_tree(**where, path_in_repo="deep")]
    operations = [CommitOperationDelete("deep/")]
    seen["final"] = api.create_commit(**where, operations=operations, commit_message="d").oid
    late = {**where, **parent, "operations": operations, "commit_message": "s"}
    seen["stale"] = raised(lambda: api.create_commit(**late))
    return seen


def read(api, shas: list[str]) -> dict:
    """The dataset through every reader, at `main` and at an old commit."""
    from huggingface_hub import HfFileSystem

    where = {"repo_id": DATA, "repo_type": "dataset"}
    snapshots = [Path(api.snapshot_download(**where, revision=sha)) for sha in (None, shas[0])]
    shard = Path(api.hf_hub_download(**where, filename=SHARD)).read_bytes()
    files = HfFileSystem()
    with files.open(f"datasets/{DATA}/{SHARD}", "rb", cache_type="none") as file:
        file.seek(100)
        piece = file.read(50)
    with files.open(f"datasets/{DATA}@{shas[0]}/stats.json", "rb") as file:
        old_stats = file.read().decode()
    infos = [api.repo_info(**where), api.dataset_info(DATA, revision=shas[0], files_metadata=True)]
    return {
        "snapshots": [sums(snapshot) for snapshot in snapshots],
        "slice": [piece.hex(), shard[100:150].hex()],
        "old_stats": old_stats,
        "listed": [api.list_repo_files(**where), files.glob(f"datasets/{DATA}/**/*.parquet")],
        "infos": [info.sha for info in infos],
        "sizes": {s.rfilename: [s.size, bool(s.lfs)] for s in infos[1].siblings},
        "paths": [p.path for p in api.get_paths_info(**where, paths=["data", SHARD, "none"])],
        "exists": [api.file_exists(**where, filename=name) for name in (SHARD, "none")],
        "whoami": api.whoami()["name"],
    }


def load(sha: str) -> dict:
    from datasets import load_dataset

    new, old = load_dataset(DATA, split="train"), load_dataset(DATA, split="train", revision=sha)
    return {"new": new.to_dict(), "old": len(old)}


def raised(action) -> list:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        action()
    except HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code]
    return []


def refusals(api) -> dict:
    def get(repo: str, name: str = "config.json", **options: object):
        return raised(lambda: api.hf_hub_download(repo, name, **options))

    return {
        "no repository": get("user/none"),
        "no revision": get("user/secret", revision="0" * 40),
        "no file": get("user/secret", "none"),
        "no revision info": raised(lambda: api.model_info("user/secret", revision="v1")),
        "no folder": raised(lambda: list(api.list_repo_tree("user/secret", "none"))),
        "gated": get("user/gated"),
        "gated listing": raised(lambda: api.list_repo_files("user/gated")),
        "private, no token": get("user/secret", token=False),
        "private, wrong token": get("user/secret", token="hf_wrong"),
        "private info, no token": raised(lambda: api.model_info("user/secret", token=False)),
        "private, token": get("user/secret"),
        "create, no token": raised(lambda: api.create_repo("user/new", token=False)),
        "create, taken": raised(lambda: api.create_repo("user/secret")),
        "whoami, wrong token": raised(lambda: api.whoami(token="hf_wrong")),
    }


def tiny_model(api, home: Path) -> dict:
    """A model and a tokenizer, up and down again, with what they make of one sentence."""
    import torch
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 3}
    config = tf.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    model = tf.LlamaForCausalLM(config).eval()
    for part in (model, tokenizer):
        part.save_pretrained(home / "tiny")
    api.create_repo(MODEL, private=True)
    api.upload_folder(repo_id=MODEL, folder_path=home / "tiny")
    again = tf.AutoTokenizer.from_pretrained(MODEL)("hello world", return_tensors="pt")
    with torch.no_grad():
        logits = tf.AutoModelForCausalLM.from_pretrained(MODEL).eval()(again["input_ids"]).logits
        expected = model(again["input_ids"]).logits
    return {"ids": again["input_ids"].tolist(), "same": torch.allclose(logits, expected, atol=1e-6)}


def drive_clients(home: Path) -> dict:
    from huggingface_hub import HfApi

    api = HfApi()
    published = publish(api, home)
    return {
        "published": published,
        "read": read(api, published["shas"]),
        "loaded": load(published["shas"][0]),
        "refused": refusals(api),
        "model": tiny_model(api, home),
    }


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        hub.add_repo("model", "user/gated", SECRET, gated=True)
        hub.add_repo("model", "user/secret", SECRET, private=True)
        yield hub


@pytest.fixture(scope="module")
def seen(hub, tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("clients")
    command = [sys.executable, __file__, str(home)]
    run = subprocess.run(command, env=hub.environment(home), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads((home / "seen.json").read_text())


def stored_sums(hub: LoopbackHub, revision: str = "main") -> dict[str, str]:
    files = hub.files("dataset", DATA, revision)
    assert files.pop(".gitattributes")
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


def test_uploaded_bytes_are_stored(hub, seen):
    published = seen["published"]
    assert published["created"] == [DATA, DATA]
    for sha, expected in zip(published["shas"], published["sums"], strict=True):
        assert stored_sums(hub, sha) == expected


def test_commits_are_counted(hub, seen):
    """Two versions, an edit and a deletion; the unchanged upload made none."""
    published = seen["published"]
    commits = [r.status for r in hub.requests if f"{DATA}/commit/main" in r.path]
    assert commits == [200, 200, 200, 200, 412]
    assert published["unchanged"] == published["shas"][1]
    assert published["stale"] == ["HfHubHTTPError", 412]


def test_deletions(hub, seen):
    published = seen["published"]
    assert published["deep"] == ["deep/er", "deep/note.txt"]
    edited, final = (set(stored_sums(hub, published[name])) for name in ("edited", "final"))
    assert edited - final == {"deep/er/blob.bin", "deep/note.txt"}
    assert final == set(published["sums"][1]) - {"stats.json"}


def test_downloaded_bytes_are_the_uploaded_ones(seen):
    published, (new, old) = seen["published"], seen["read"]["snapshots"]
    assert new.pop(".gitattributes") == old.pop(".gitattributes")
    assert old == published["sums"][0]
    assert new == {p: s for p, s in published["sums"][1].items() if p != "stats.json"}


def test_old_commits_stay_readable(seen):
    published, read = seen["published"], seen["read"]
    assert json.loads(read["old_stats"]) == {"rows": 1000}
    assert read["infos"] == [published["final"], published["shas"][0]]


def test_range_read_fetches_only_the_slice(hub, seen):
    received, expected = seen["read"]["slice"]
    assert received == expected
    assert [r.sent for r in hub.requests if r.status == 206] == [50]


def test_listings(hub, seen):
    read, files = seen["read"], hub.files("dataset", DATA)
    assert read["listed"] == [sorted(files), [f"datasets/{DATA}/{SHARD}"]]
    old = hub.files("dataset", DATA, seen["published"]["shas"][0])
    assert read["sizes"] == {p: [len(data), p == SHARD] for p, data in old.items()}
    assert read["paths"] == ["data", SHARD]
    assert read["exists"] == [True, False]
    assert read["whoami"] == "user"


def test_load_dataset(seen):
    text = [f"row {i}" for i in range(2000)]
    assert seen["loaded"] == {"new": {"x": list(range(2000)), "text": text}, "old": 1000}


def test_refusals_raise_the_clients_own_exceptions(seen):
    assert seen["refused"] == {
        "no repository": ["RepositoryNotFoundError", 404],
        "no revision": ["RevisionNotFoundError", 404],
        "no file": ["RemoteEntryNotFoundError", 404],
        "no revision info": ["RevisionNotFoundError", 404],
        "no folder": ["RemoteEntryNotFoundError", 404],
        "gated": ["GatedRepoError", 403],
        "gated listing": [],
        "private, no token": ["RepositoryNotFoundError", 401],
        "private, wrong token": ["RepositoryNotFoundError", 401],
        "private info, no token": ["RepositoryNotFoundError", 401],
        "private, token": [],
        "create, no token": ["HfHubHTTPError", 401],
        "create, taken": ["HfHubHTTPError", 409],
        "whoami, wrong token": ["HfHubHTTPError", 401],
    }


def test_transformers_load_a_private_model(hub, seen):
    assert seen["model"] == {"ids": [[1, 2]], "same": True}
    assert "model.safetensors" in hub.files("model", MODEL)


@pytest.mark.parametrize(
    ("headers", "status", "body"),
    [
        ({}, 200, b"0123456789"),
        ({"Range": "bytes=2-4"}, 206, b"234"),
        ({"Range": "bytes=7-"}, 206, b"789"),
        ({"Range": "bytes=-2"}, 206, b"89"),
        ({"Range": "bytes=8-99"}, 206, b"89"),
        ({"Range": "bytes=10-"}, 416, b""),
        ({"If-None-Match": "etag"}, 304, b""),
    ],
)
def test_raw_answers(hub, headers, status, body):
    """What no client above asks for, but resumed downloads and caches do."""
    sha = hub.add_repo("dataset", "user/raw", {"a.bin": b"0123456789"})
    etag = f'"{hashlib.sha256(b"0123456789").hexdigest()}"'
    headers = {k: etag if v == "etag" else v for k, v in headers.items()}
    url = f"{hub.url}/datasets/user/raw/resolve/{sha}/a.bin"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        answer = error
    assert (answer.status, answer.read()) == (status, body)
    assert (answer.headers["X-Repo-Commit"], answer.headers["X-Linked-Etag"]) == (sha, etag)
    assert (hub.requests[-1].status, hub.requests[-1].sent) == (status, len(body))


def test_environment_keeps_nothing_of_the_callers(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid")
    environment = hub.environment(tmp_path)
    assert environment.keys().isdisjoint({"HF_HUB_OFFLINE", "https_proxy"})
    assert (environment["HF_ENDPOINT"], environment["HF_TOKEN"]) == (hub.url, TOKEN)


@pytest.fixture
def faulty():
    """A hub that fails on demand, with a dataset of one commit."""
    with LoopbackHub() as hub:
        hub.add_repo("dataset", DATA, {"old.txt": b"old"})
        yield hub


@pytest.fixture
def naps(monkeypatch):
    """How long the client means to wait before each retry."""
    from huggingface_hub.utils import _http

    naps = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=naps.append))
    return naps


@pytest.fixture
def api(faulty, naps, monkeypatch):  # noqa: ARG001
    import httpx2
    from huggingface_hub import HfApi, constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    set_client_factory(lambda: httpx2.Client(timeout=30, trust_env=False))
    yield HfApi(endpoint=faulty.url, token=TOKEN)
    set_client_factory(default_client_factory)


@pytest.fixture
def impatient_api(api):
    import httpx2
    from huggingface_hub import set_client_factory

    set_client_factory(lambda: httpx2.Client(timeout=3, trust_env=False))
    return api


def upload(api, files: dict[str, bytes | Path], **options: str) -> str:
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    title = f"Add {', '.join(files)}"
    where = {"repo_id": DATA, "repo_type": "dataset"}
    return api.create_commit(**where, operations=operations, commit_message=title, **options).oid


def titles(hub: LoopbackHub, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.commits("dataset", DATA, revision)]


def faults_met(hub: LoopbackHub) -> list[tuple]:
    return [(r.fault, r.status) for r in hub.requests if r.fault]


@pytest.mark.parametrize("step", ["preupload", "lfs_batch", "lfs_put"])
@pytest.mark.parametrize(
    ("fault", "status", "nap"),
    [
        ({"kind": "refuse", "status": 500}, 500, 1),
        ({"kind": "refuse", "status": 429, "headers": {"Retry-After": "3"}}, 429, 4),
        ({"kind": "cut"}, 0, 1),
        ({"kind": "lost"}, 0, 1),
    ],
)
def test_the_client_repeats_each_step_before_the_commit(faulty, api, naps, step, fault, status, nap):
    faulty.inject(Fault(on=step, **fault))
    upload(api, {"a.bin": b"a"})
    assert faults_met(faulty) == [(fault["kind"], status)]
    assert naps == [nap]
    assert titles(faulty) == ["initial commit", "Add a.bin"]


@pytest.mark.parametrize("status", [409, 412, 429, 500, 502, 503, 504])
def test_a_refused_commit_is_not_carried_out_and_not_repeated(faulty, api, naps, status):
    faulty.inject(Fault("refuse", "commit", status=status, headers={"Retry-After": "1"}))
    assert raised(lambda: upload(api, {"a.bin": b"a"})) == ["HfHubHTTPError", status]
    assert (faults_met(faulty), naps) == ([("refuse", status)], [])
    assert titles(faulty) == ["initial commit"]


def test_the_headers_of_a_refusal_arrive(faulty, api, naps):
    faulty.inject(Fault("refuse", "lfs_batch", status=429, headers={"ratelimit": '"api";r=0;t=7'}))
    upload(api, {"a.bin": b"a"})
    assert naps == [8]


@pytest.mark.parametrize(("kind", "landed"), [("cut", []), ("lost", ["Add a.bin"])])
def test_a_commit_without_an_answer(faulty, api, kind, landed):
    from httpx2 import RemoteProtocolError

    faulty.inject(Fault(kind, "commit"))
    with pytest.raises(RemoteProtocolError):
        upload(api, {"a.bin": b"a"})
    assert titles(faulty) == ["initial commit", *landed]
    assert faults_met(faulty) == [(kind, 0)]


@pytest.mark.parametrize(("kind", "uploads"), [("cut", 1), ("lost", 2)])
def test_an_upload_without_an_answer(faulty, api, tmp_path, kind, uploads):
    """A file from disk and larger than any buffer on the way, so that a cut comes amid the sending."""
    path = tmp_path / "big.bin"
    path.write_bytes(bytes(8_000_000))
    faulty.inject(Fault(kind, "lfs_put"))
    upload(api, {"big.bin": path})
    assert faulty.files("dataset", DATA)["big.bin"] == path.read_bytes()
    assert faulty.uploaded == {sums(tmp_path)["big.bin"]: uploads}


def test_a_client_that_dies_while_sending_commits_nothing(faulty):
    lines = [{"key": "header", "value": {"summary": "half"}}, {"key": "deletedFile", "value": {"path": "old.txt"}}]
    body = "".join(json.dumps(line) + "\n" for line in lines)
    headers = f"Authorization: Bearer {TOKEN}\r\nContent-Length: {len(body) + 100}\r\n"
    with socket.create_connection(faulty.url.removeprefix("http://").split(":")) as client:
        client.sendall(f"POST /api/datasets/{DATA}/commit/main HTTP/1.1\r\n{headers}\r\n{body}".encode())
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert [(r.status, r.fault) for r in faulty.requests] == [(0, None)]
    assert titles(faulty) == ["initial commit"]


def test_a_slow_answer(faulty, api):
    faulty.inject(Fault("slow", "commit", seconds=0.3))
    began = time.monotonic()
    upload(api, {"a.txt": b"a"})
    assert time.monotonic() - began > 0.3
    assert faults_met(faulty) == [("slow", 200)]


@pytest.mark.parametrize(("kind", "landed"), [("stall", []), ("slow", ["Add a.txt"])])
def test_the_client_gives_up_waiting_for_a_commit(faulty, impatient_api, kind, landed):
    """A slow commit lands at once: what its client gives up on is only the answer."""
    from httpx2 import ReadTimeout

    faulty.inject(Fault(kind, "commit", seconds=30))
    with pytest.raises(ReadTimeout):
        upload(impatient_api, {"a.txt": b"a"})
    faulty.stop()
    assert titles(faulty) == ["initial commit", *landed]
    assert faults_met(faulty) == [(kind, 0)]


def test_the_client_repeats_an_upload_that_stalls(faulty, impatient_api):
    faulty.inject(Fault("stall", "lfs_put"))
    upload(impatient_api, {"a.bin": b"a"})
    assert faults_met(faulty) == [("stall", 0)]
    assert list(faulty.uploaded.values()) == [1]


@pytest.mark.parametrize("kind", ["stall", "slow"])
def test_going_down_waits_for_no_answer(faulty, kind):
    faulty.inject(Fault(kind, "info", seconds=30))
    url = f"{faulty.url}/api/datasets/{DATA}"
    with socket.create_connection(faulty.url.removeprefix("http://").split(":")) as client:
        client.sendall(f"GET {url} HTTP/1.1\r\n\r\n".encode())
        threading.Timer(0.2, faulty.stop).start()
        began = time.monotonic()
        assert client.recv(1) == b""
        assert time.monotonic() - began < 20  # and not 30


def test_somebody_else_commits_first(faulty, api):
    head = faulty.commits("dataset", DATA)[-1].sha
    faulty.inject(Fault("conflict", "commit", times=2))
    assert raised(lambda: upload(api, {"a.txt": b"a"}, parent_commit=head)) == ["HfHubHTTPError", 412]
    theirs = faulty.files("dataset", DATA)
    assert theirs.keys() == {"old.txt", "notes.txt"}
    upload(api, {"a.txt": b"a"})
    both = faulty.files("dataset", DATA)
    assert both.keys() == {"old.txt", "notes.txt", "a.txt"}
    assert both["notes.txt"] != theirs["notes.txt"]
    assert faults_met(faulty) == [("conflict", 412), ("conflict", 200)]


def test_faults_count_the_requests_that_match(faulty, api):
    faulty.inject(
        Fault("refuse", "commit", status=500, skip=1),
        Fault("refuse", f"/{DATA}/commit/", status=502, skip=1),
        Fault("refuse", "/commit/", method="GET", times=math.inf),
    )
    seen = [raised(lambda n=n: upload(api, {f"{n}.txt": b"x"})) for n in range(4)]
    assert [error[1:] for error in seen] == [[], [500], [502], []]


@pytest.mark.parametrize(("kind", "step"), [("cuts", "commit"), ("cut", "comit")])
def test_misspelt_faults_are_told(faulty, kind, step):
    with pytest.raises(ValueError, match=r"none of|neither"):
        faulty.inject(Fault(kind, step))


def meet_at_random(api, seed: int) -> list[tuple]:
    """Uploads to a new hub under random faults, then one without."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    with LoopbackHub() as hub:
        hub.add_repo("dataset", DATA)
        hub.inject_randomly(seed, 0.4)
        api.endpoint = hub.url
        for n in range(10):
            with suppress(HfHubHTTPError, TransportError, RuntimeError):  # RuntimeError: around those of LFS uploads
                head = api.repo_info(DATA, repo_type="dataset").sha
                upload(api, {f"{n}.bin": b"%d" % n}, parent_commit=head)
        hub.clear_faults()
        met = faults_met(hub)
        upload(api, {"last.bin": b"last"})
        assert faults_met(hub) == met
        return met


def test_random_faults_come_again_with_their_seed(api):
    one, again, other = (meet_at_random(api, seed) for seed in (1, 1, 11))
    assert one == again != other
    assert {kind for kind, _ in one + other} == set(KINDS) - {"stall", "drip", "stray"}


def test_down_and_up_again(faulty, api):
    """The client's open connection does not outlive the hub, nor does it keep it from coming back."""
    from httpx2 import ConnectError

    for n in range(3):
        upload(api, {f"{n}.bin": b"%d" % n})
        faulty.stop()
        with pytest.raises(ConnectError):
            upload(api, {"none.bin": b"none"})
        faulty.start()
    assert faulty.files("dataset", DATA).keys() == {"old.txt", "0.bin", "1.bin", "2.bin"}


def test_branches(faulty, api, tmp_path):
    where = {"repo_id": DATA, "repo_type": "dataset"}
    first = faulty.commits("dataset", DATA)[0].sha
    upload(api, {"main.txt": b"main"})
    for branch, start in (("runs/one", first), ("two", "runs/one"), ("three", None)):
        api.create_branch(**where, branch=branch, revision=start)
    made = upload(api, {"a.bin": b"a"}, revision="runs/one", parent_commit=first)
    assert titles(faulty, "runs/one") == ["initial commit", "Add a.bin"]
    assert faulty.files("dataset", DATA, "runs/one") == {"old.txt": b"old", "a.bin": b"a"}
    assert titles(faulty) == titles(faulty, "three") == ["initial commit", "Add main.txt"]
    assert upload(api, {"a.bin": b"a"}, revision="runs/one") == made  # preupload knows the branch's files
    assert api.repo_info(**where, revision="runs/one").sha == made
    assert api.list_repo_files(**where, revision="runs/one") == ["a.bin", "old.txt"]
    local = api.hf_hub_download(**where, filename="a.bin", revision="runs/one", cache_dir=tmp_path)
    assert Path(local).read_bytes() == b"a"
    refs = {ref.name: ref.target_commit for ref in api.list_repo_refs(**where).branches}
    assert refs == {
        name: faulty.commits("dataset", DATA, name)[-1].sha for name in ("main", "runs/one", "two", "three")
    }
    assert refs["two"] == first


def test_branches_that_cannot_be(faulty, api):
    where = {"repo_id": DATA, "repo_type": "dataset"}
    assert raised(lambda: api.create_branch(**where, branch="main")) == ["HfHubHTTPError", 409]
    api.create_branch(**where, branch="main", exist_ok=True)
    nowhere = raised(lambda: api.create_branch(**where, branch="x", revision="none"))
    assert nowhere == raised(lambda: upload(api, {"a.bin": b"a"}, revision="x")) == ["RevisionNotFoundError", 404]
    faulty.inject(Fault("conflict", "commit"))
    api.create_branch(**where, branch="x")
    upload(api, {"a.txt": b"a"}, revision="x")
    assert titles(faulty, "x") == ["initial commit", "Somebody else's note", "Add a.txt"]
    assert titles(faulty) == ["initial commit"]


def test_facts_about_commits(faulty, api):
    began = time.monotonic()
    shas = [upload(api, {"b.bin": b"same", "a.txt": b"a"}), upload(api, {"c.bin": b"same"})]
    first, *commits = faulty.commits("dataset", DATA)
    assert [(commit.sha, commit.paths) for commit in commits] == [(shas[0], ("b.bin", "a.txt")), (shas[1], ("c.bin",))]
    assert first.paths == ("old.txt",)
    assert first.time < began < commits[0].time < commits[1].time < time.monotonic()
    assert faulty.uploaded == {hashlib.sha256(b"same").hexdigest(): 1}


def test_upload_addresses_are_signed(faulty, api, caplog):
    """They leak: the client itself warns of a failed upload with its whole address."""
    faulty.inject(Fault("refuse", "lfs_put"))
    with caplog.at_level("WARNING", logger="huggingface_hub"):  # whatever the toolkit has set it to in this process
        upload(api, {"a.bin": b"a"})
    assert [SIGNATURE in r.path for r in faulty.requests if r.method == "PUT"] == [True, True]
    assert SIGNATURE in caplog.text


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "seen.json").write_text(json.dumps(drive_clients(out)))
