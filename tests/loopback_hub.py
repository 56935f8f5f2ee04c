"""A Hugging Face Hub on 127.0.0.1, so that tests drive the real client libraries offline.

It answers the calls with which huggingface_hub, datasets and transformers publish and read model
and dataset repositories, over plain HTTP and LFS (no Xet). Repositories live in memory.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "user", "hf_dummy"
LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".npy", ".npz", ".parquet", ".pt", ".safetensors", ".zst")
LFS_MIN_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
CHUNK = 64 * 1024


@dataclass
class Request:
    """One answered request; `sent` counts the body's bytes as they leave."""

    method: str
    path: str  # as on the wire: quoted, with its query
    status: int
    sent: int = 0


@dataclass
class Response:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """A refusal; clients pick the exception class they raise by its X-Error-Code."""

    def __init__(self, status: int, code: str, message: str, headers: dict | None = None) -> None:
        super().__init__(message)
        self.response = _json({"error": message}, status)
        self.response.headers |= {"X-Error-Message": message} | (headers or {})
        if code:
            self.response.headers["X-Error-Code"] = code


def _json(data: object, status: int = 200) -> Response:
    return Response(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class File:
    """Bytes at a path of a commit; `lfs` decides which hash the Hub shows for them."""

    def __init__(self, data: bytes, lfs: bool) -> None:
        self.data, self.lfs = data, lfs
        sha256 = hashlib.sha256(data).hexdigest()
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{sha256}")
        pointer = "\n".join((*lines, f"size {len(data)}\n")).encode()
        self.oid = _git_oid(pointer if lfs else data)
        self.etag = sha256 if lfs else self.oid
        self._lfs_info = {"size": len(data), "pointerSize": len(pointer)}

    def describe(self, oid_key: str, hash_key: str) -> dict:
        """Size and hashes; trees and repository infos name the same hashes differently."""
        lfs = {"lfs": {hash_key: self.etag} | self._lfs_info} if self.lfs else {}
        return {oid_key: self.oid, "size": len(self.data)} | lfs


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_MIN_SIZE)


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents][:-1]


def _entries(files: dict[str, File]) -> dict[str, dict]:
    """Tree entries by path, with the folders that git only implies."""
    found = {}
    for path, file in files.items():
        for folder in _parents(path):
            oid = _git_oid(folder.encode())
            found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        found[path] = {"type": "file", "path": path} | file.describe("oid", "oid")
    return dict(sorted(found.items()))


class Repo:
    """A line of immutable commits, of which `main` is the newest."""

    def __init__(self, kind: str, name: str, private: bool, gated: bool) -> None:
        self.kind, self.name, self.private, self.gated = kind, name, private, gated
        self.url_path = name if kind == "model" else f"{kind}s/{name}"
        self.commits: dict[str, dict[str, File]] = {}
        self.head = ""

    def commit(self, files: dict[str, File], title: str) -> str:
        tree = sorted((path, file.oid) for path, file in files.items())
        identity = json.dumps([self.url_path, len(self.commits), self.head, title, tree])
        self.head = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def at(self, revision: str) -> tuple[str, dict[str, File]]:
        sha = self.head if revision == "main" else revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


def _apply(files: dict[str, File], key: str, value: dict, uploads: dict[str, bytes]) -> None:
    """Carry out one line of a commit payload on `files`."""
    path = value["path"].rstrip("/")
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile" and value["oid"] in uploads:
        files[path] = File(uploads[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [p for p in files if path in ([p] if key == "deletedFile" else _parents(p))]
        if not gone:
            raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        for old in gone:
            del files[old]
    else:
        raise HubError(400, "", f"Cannot commit {key} {path}: unknown, or never uploaded")


def _content(data: bytes, wanted: str, headers: dict[str, str]) -> Response:
    """All of `data`, or the one byte range that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if not match or not any(match.groups()):
        return Response(200, data, headers)
    size, (first, last) = len(data), match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        return Response(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    headers |= {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
    return Response(206, data[start:end], headers)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # clients open many connections at once
    hub: "LoopbackHub"

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up at any time
            super().handle_error(request, client_address)


class Call(BaseHTTPRequestHandler):
    """One request after another of a connection, as the routes of the hub read them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or answers wait 40 ms for the client's delayed ACK
    server: _Server
    body: bytes

    def _dispatch(self) -> None:
        """Every request passes here: the one place to refuse, delay, cut or lose answers."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._write(self.server.hub.answer(self))

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _write(self, response: Response) -> None:
        """Counts bytes just before they go, so that no client can see them uncounted."""
        record = Request(self.command, self.path, response.status)
        self.server.hub.requests.append(record)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else response.body
        for start in range(0, len(body), CHUNK):
            record.sent += len(body[start : start + CHUNK])
            self.wfile.write(body[start : start + CHUNK])

    def log_message(self, *_: object) -> None:
        """Silent: `LoopbackHub.requests` is the log."""

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def json(self) -> dict:
        return json.loads(self.body)

    def asks(self, flag: str) -> bool:
        return parse_qs(urlsplit(self.path).query).get(flag, [""])[0].lower() in ("1", "true")


class LoopbackHub:
    """The Hub: a context manager that serves the repositories it is given or asked to create."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._uploads: dict[str, bytes] = {}  # LFS objects by sha256
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), Call)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path | str) -> dict[str, str]:
        """Variables for a subprocess whose Hub is this one and whose caches are under `home`."""
        ours = re.compile("(HF|HUGGING|TRANSFORMERS)_?.*|(HTTPS?|ALL)_PROXY", re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
        env |= {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(Path(home, "hf_home"))}
        return env | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def add_repo(
        self,
        kind: str,
        name: str,
        files: dict[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Put a repository ("model" or "dataset") in place; gives the sha of its only commit."""
        repo = self._repos[kind, name] = Repo(kind, name, private, gated)
        given = (files or {}).items()
        stored = {path: File(data, _is_lfs(path, len(data))) for path, data in given}
        self._uploads |= {file.etag: file.data for file in stored.values() if file.lfs}
        return repo.commit(stored, "initial commit")

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        _, files = self._repos[kind, name].at(revision)
        return {path: file.data for path, file in files.items()}

    def answer(self, call: Call) -> Response:
        try:
            for methods, pattern, route, writes in _ROUTES:
                match = pattern.fullmatch(urlsplit(call.path).path)
                if match and call.command in methods:
                    if writes and not call.has_token():
                        raise HubError(401, "", "Invalid username or password.")
                    return route(self, call, **self._arguments(call, match))
            raise HubError(404, "", f"This stand-in has no route for {call.command} {call.path}")
        except HubError as error:
            return error.response

    def _arguments(self, call: Call, match: re.Match) -> dict:
        """The named parts of the path, unquoted, with the repository in place of its name."""
        parts = {key: unquote(value) for key, value in match.groupdict().items() if value}
        if "name" not in parts:
            return parts
        key = parts.pop("kinds", "models")[:-1], parts.pop("name")
        if key not in self._repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        if self._repos[key].private and not call.has_token():
            raise HubError(401, "RepoNotFound", "Repository not found")
        return parts | {"repo": self._repos[key]}

    def _whoami(self, call: Call) -> Response:
        if not call.has_token():
            raise HubError(401, "", "Invalid credentials in Authorization header")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def _validate_yaml(self, _call: Call) -> Response:
        return _json({"errors": [], "warnings": []})

    def _create(self, call: Call) -> Response:
        wanted = call.json()
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        with self._lock:
            status = 409 if (kind, name) in self._repos else 200
            if status == 200:
                private = wanted.get("visibility") == "private"
                files = {".gitattributes": GITATTRIBUTES.encode()}
                self.add_repo(kind, name, files, private=private)
        url = f"{self.url}/{self._repos[kind, name].url_path}"
        taken = {"error": "You already created this repo"} if status == 409 else {}
        return _json({"url": url, "name": name} | taken, status)

    def _info(self, call: Call, repo: Repo, revision: str = "main") -> Response:
        sha, files = repo.at(revision)
        blobs = call.asks("blobs")
        siblings = [
            {"rfilename": path} | (file.describe("blobId", "sha256") if blobs else {})
            for path, file in sorted(files.items())
        ]
        info = {"id": repo.name, "author": repo.name.split("/")[0], "sha": sha, "tags": []}
        access = {"private": repo.private, "gated": "manual" if repo.gated else False}
        return _json(info | access | {"downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, call: Call, repo: Repo, revision: str, path: str = "") -> Response:
        entries = _entries(repo.at(revision)[1])
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        prefix, deep = path and f"{path}/", call.asks("recursive")
        below = {p: e for p, e in entries.items() if p.startswith(prefix)}
        return _json([e for p, e in below.items() if deep or "/" not in p[len(prefix) :]])

    def _paths_info(self, call: Call, repo: Repo, revision: str) -> Response:
        entries = _entries(repo.at(revision)[1])
        paths = parse_qs(call.body.decode()).get("paths", [])
        return _json([entries[path] for path in paths if path in entries])

    def _preupload(self, call: Call, repo: Repo, revision: str) -> Response:
        """Says how to send each file; with the present oid, clients skip what has not changed."""
        _, present = repo.at(revision)
        answers = []
        for file in call.json()["files"]:
            path, mode = file["path"], "lfs" if _is_lfs(file["path"], file["size"]) else "regular"
            oid = {"oid": present[path].etag} if path in present else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | oid)
        return _json({"files": answers})

    def _lfs_batch(self, call: Call, repo: Repo) -> Response:  # noqa: ARG002
        """Gives an upload address to each object that is not stored yet."""
        objects = []
        for wanted in call.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{oid}"}}}
            objects.append({"oid": oid, "size": size} | ({} if oid in self._uploads else upload))
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, call: Call, oid: str) -> Response:
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "", "The bytes do not have the announced sha256")
        self._uploads[oid] = call.body
        return Response(200)

    def _commit(self, call: Call, repo: Repo, revision: str) -> Response:
        """Applies all operations or none; refused if `main` has left the parent it was built on."""
        if revision != "main":
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        header, *operations = (json.loads(line) for line in call.body.splitlines())
        with self._lock:
            if header["value"].get("parentCommit") not in (None, repo.head):
                raise HubError(412, "", "A commit has happened since. Please refresh.")
            files = dict(repo.at(revision)[1])
            for operation in operations:
                _apply(files, operation["key"], operation["value"], self._uploads)
            sha = repo.commit(files, header["value"]["summary"])
        url = f"{self.url}/{repo.url_path}/commit/{sha}"
        return _json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Response:
        """A file's bytes. Gating hides these only: as on the Hub, listings stay readable."""
        if repo.gated:
            raise HubError(403, "GatedRepo", f"Access to {repo.kind} {repo.name} is restricted.")
        sha, files = repo.at(revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        file = files[path]
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            size = str(len(file.data))
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": size}
        if call.headers.get("If-None-Match") == headers["ETag"]:
            return Response(304, b"", headers)
        return _content(file.data, call.headers.get("Range", ""), headers)


_API = "/api/(?P<kinds>models|datasets)/(?P<name>[^/]+/[^/]+)"
_GIT = "/(?:(?P<kinds>datasets)/)?(?P<name>[^/]+/[^/]+)"
_AT = "/(?P<revision>[^/]+)"
_ROUTES = [  # methods, path, answer, whether it takes a token whatever the repository
    (methods, re.compile(path), route, writes)
    for methods, path, route, writes in (
        (("GET",), "/api/whoami-v2", LoopbackHub._whoami, False),
        (("POST",), "/api/validate-yaml", LoopbackHub._validate_yaml, False),
        (("POST",), "/api/repos/create", LoopbackHub._create, True),
        (("GET",), f"{_API}(?:/revision{_AT})?", LoopbackHub._info, False),
        (("GET",), f"{_API}/tree{_AT}(?:/(?P<path>.+))?", LoopbackHub._tree, False),
        (("POST",), f"{_API}/paths-info{_AT}", LoopbackHub._paths_info, False),
        (("POST",), f"{_API}/preupload{_AT}", LoopbackHub._preupload, True),
        (("POST",), f"{_API}/commit{_AT}", LoopbackHub._commit, True),
        (("POST",), rf"{_GIT}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch, True),
        (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", LoopbackHub._lfs_put, False),
        (("GET", "HEAD"), f"{_GIT}/resolve{_AT}/(?P<path>.+)", LoopbackHub._resolve, False),
    )
]
