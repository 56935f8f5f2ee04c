"""The stand-in Hub is only worth its tests if the real clients cannot tell it from the Hub.

One subprocess (this file, run as a script under the hub's environment) drives the clients through
everything and writes down what it saw; the tests compare that with what the hub holds.
"""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from loopback_hub import TOKEN, LoopbackHub

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
    return {"ids": again["input_ids"].tolist(), "same": torch.equal(logits, expected)}


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


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "seen.json").write_text(json.dumps(drive_clients(out)))
