"""A Hugging Face Hub on 127.0.0.1, so that tests drive the real client libraries offline.

It answers the calls with which huggingface_hub, datasets and transformers publish and read model
and dataset repositories, over plain HTTP and LFS (no Xet). Repositories live in memory. It fails
on demand (`inject`, `inject_randomly`) and can go down and come up again (`stop`, `start`).
"""

import base64
import hashlib
import json
import os
import re
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from hub_faults import KINDS, READ_STEPS, WRITE_STEPS, Fault, Faults, RandomFaults

USER, TOKEN = "user", "hf_dummy"
SIGNATURE = "SECRETSIGNATURE"  # in upload addresses, as in the Hub's presigned ones: no log may show it
LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".npy", ".npz", ".parquet", ".pt", ".safetensors", ".zst")
LFS_MIN_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)
CHUNK = 64 * 1024


@dataclass
class Request:
    """One request; `sent` counts the bytes of the answer's body as they leave."""

    method: str
    path: str  # as on the wire: quoted, with its query
    status: int  # 0: the connection was closed without an answer
    sent: int = 0
    fault: str | None = None  # the kind of the fault that hit it


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


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    paths: tuple[str, ...]  # of its operations, in their order
    time: float  # on time.monotonic()'s clock
    parent: str = field(repr=False)
    files: dict[str, File] = field(repr=False)


class Repo:
    """Immutable commits; each branch is the sha of its newest one."""

    def __init__(self, kind: str, name: str, private: bool, gated: bool) -> None:
        self.kind, self.name, self.private, self.gated = kind, name, private, gated
        self.url_path = name if kind == "model" else f"{kind}s/{name}"
        self.by_sha: dict[str, Commit] = {}
        self.branches = {"main": ""}

    def commit(self, files: dict[str, File], title: str, paths: Iterable[str], branch: str = "main") -> str:
        parent = self.branches[branch]
        tree = sorted((path, file.oid) for path, file in files.items())
        identity = json.dumps([self.url_path, len(self.by_sha), parent, title, tree])
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.by_sha[sha] = Commit(sha, title, tuple(paths), time.monotonic(), parent, files)
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision, revision)
        if sha not in self.by_sha:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.by_sha[sha]

    def history(self, revision: str) -> list[Commit]:
        """The commits up to `revision`, oldest first."""
        found = [self.at(revision)]
        while found[-1].parent:
            found.append(self.by_sha[found[-1].parent])
        return found[::-1]

    def interfere(self, branch: str) -> None:
        """Somebody else's commit, unlike any other."""
        note = File(b"note %d\n" % len(self.by_sha), lfs=False)
        self.commit(self.at(branch).files | {"notes.txt": note}, "Somebody else's note", ["notes.txt"], branch)


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
    """Serves from its creation until `close`, and knows its connections."""

    request_queue_size = 64  # clients open many connections at once

    def __init__(self, hub: "LoopbackHub", port: int) -> None:
        super().__init__(("127.0.0.1", port), Call)
        self.hub = hub
        self._connections: dict[socket.socket, threading.Thread] = {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def process_request(self, request: socket.socket, client_address: object) -> None:
        arguments = {"target": self.process_request_thread, "args": (request, client_address)}
        self._connections[request] = threading.Thread(**arguments, daemon=True)
        self._connections[request].start()

    def shutdown_request(self, request: socket.socket) -> None:
        super().shutdown_request(request)
        self._connections.pop(request, None)

    def close(self) -> None:
        """Refuse connections, drop those there are, and let no call go on behind the caller's back."""
        self.shutdown()
        self.server_close()
        for connection, thread in list(self._connections.items()):
            with suppress(OSError):  # closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=10)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up at any time
            super().handle_error(request, client_address)


class Call(BaseHTTPRequestHandler):
    """One request after another of a connection, as the routes of the hub read them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or answers wait 40 ms for the client's delayed ACK
    server: _Server
    body: bytes
    fault: Fault | None

    def _dispatch(self) -> None:
        """Every request passes here: the one place to delay, cut or lose answers."""
        self.fault = self.server.hub.strike(self)
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length // 2 if self.hit_by("cut") else length)
        if self.hit_by("cut", "stall") or len(self.body) < length:
            self._hang_up()
            return
        response = self.server.hub.answer(self)
        if self.hit_by("lost") or (self.hit_by("slow") and self._left_within(self.fault.seconds)):
            self._hang_up()
        else:
            self._write(response)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def hit_by(self, *kinds: str) -> bool:
        return self.fault is not None and self.fault.kind in kinds

    def _hang_up(self) -> None:
        self._record(0)
        self.close_connection = True
        if self.hit_by("stall"):
            self._left_within(None)

    def _left_within(self, seconds: float | None) -> bool:
        """Whether the client, or the hub by going down, ends the connection in this time.

        Before its answer a client sends nothing more, so there is nothing to read but the end.
        """
        return bool(select.select([self.connection], [], [], seconds)[0])

    def _record(self, status: int) -> Request:
        record = Request(self.command, self.path, status, fault=self.fault.kind if self.fault else None)
        self.server.hub.requests.append(record)
        return record

    def _write(self, response: Response) -> None:
        """Counts bytes just before they go, so that no client can see them uncounted."""
        record = self._record(response.status)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else response.body
        if self.hit_by("drip"):
            self._drip(body)
            return
        for start in range(0, len(body), CHUNK):
            record.sent += len(body[start : start + CHUNK])
            self.wfile.write(body[start : start + CHUNK])

    def _drip(self, body: bytes) -> None:
        for byte in body:
            if self._left_within(self.fault.seconds):
                break
            self.wfile.write(bytes([byte]))
        self.close_connection = True

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
        self.uploaded: Counter[str] = Counter()  # completed LFS uploads by sha256
        self._repos: dict[tuple[str, str], Repo] = {}
        self._objects: dict[str, bytes] = {}  # LFS objects by sha256
        self._lock = threading.Lock()
        self._faults = Faults()
        self._server: _Server | None = None
        self._seat = socket.socket()  # bound, never listening: keeps the port ours while the hub is down
        self._seat.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._seat.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._seat.getsockname()[1]}"

    def __enter__(self) -> "LoopbackHub":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._seat.close()

    def start(self) -> None:
        """Serve, again at the same address and with the same repositories."""
        if self._server is None:
            self._server = _Server(self, self._seat.getsockname()[1])

    def stop(self) -> None:
        """Go down: connections end, new ones are refused."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def inject(self, *faults: Fault) -> None:
        """Order faults; of those that match a request, the first that is not used up hits it."""
        for fault in faults:
            if "/" not in fault.on and fault.on not in _STEPS:
                raise ValueError(f"{fault.on} is neither a path nor one of {sorted(_STEPS)}")
        self._faults.order(faults)

    def inject_randomly(
        self,
        seed: int,
        rate: float,
        *,
        steps: Iterable[str] = WRITE_STEPS + READ_STEPS,
        kinds: Iterable[str] = tuple(kind for kind in KINDS if kind not in ("stall", "drip", "stray")),
    ) -> None:
        """Hit each request of these steps with probability `rate`, the same way for the same seed."""
        self._faults.draw_from(RandomFaults(seed, rate, steps, kinds))

    def clear_faults(self) -> None:
        self._faults.clear()

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
        repo = Repo(kind, name, private, gated)
        given = (files or {}).items()
        stored = {path: File(data, _is_lfs(path, len(data))) for path, data in given}
        self._objects |= {file.etag: file.data for file in stored.values() if file.lfs}
        first = repo.commit(stored, "initial commit", stored)
        self._repos[kind, name] = repo  # once it is whole: tests look at it meanwhile
        return first

    def remove_repo(self, kind: str, name: str) -> None:
        del self._repos[kind, name]

    def has_repo(self, kind: str, name: str) -> bool:
        return (kind, name) in self._repos

    def is_private(self, kind: str, name: str) -> bool:
        return self._repos[kind, name].private

    def forget_uploads(self) -> None:
        """Start counting anew, without what is stored already, which clients don't send again."""
        self.uploaded.clear()
        self._objects.clear()

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        files = self._repos[kind, name].at(revision).files
        return {path: file.data for path, file in files.items()}

    def commits(self, kind: str, name: str, revision: str = "main") -> list[Commit]:
        """The commits up to `revision`, oldest first."""
        return self._repos[kind, name].history(revision)

    def strike(self, call: Call) -> Fault | None:
        route, _ = _find_route(call)
        return self._faults.strike(route.step if route else "", call.command, call.path)

    def answer(self, call: Call) -> Response:
        try:
            if call.hit_by("stray"):
                return Response(200, b"<!doctype html><title>Log in</title>", {"Content-Type": "text/html"})
            if call.hit_by("refuse"):
                status = call.fault.status
                raise HubError(status, "", HTTPStatus(status).phrase, call.fault.headers)
            route, match = _find_route(call)
            if route is None:
                raise HubError(404, "", f"This stand-in has no route for {call.command} {call.path}")
            if route.writes and not call.has_token():
                raise HubError(401, "", "Invalid username or password.")
            arguments = self._arguments(call, match)
            if call.hit_by("conflict"):
                self._interfere(**arguments)
            return route.answer(self, call, **arguments)
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

    def _interfere(self, repo: Repo | None = None, revision: str = "main", **_: str) -> None:
        with self._lock:
            if repo and revision in repo.branches:
                repo.interfere(revision)

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
        commit, blobs = repo.at(revision), call.asks("blobs")
        siblings = [
            {"rfilename": path} | (file.describe("blobId", "sha256") if blobs else {})
            for path, file in sorted(commit.files.items())
        ]
        info = {"id": repo.name, "author": repo.name.split("/")[0], "sha": commit.sha, "tags": []}
        access = {"private": repo.private, "gated": "manual" if repo.gated else False}
        return _json(info | access | {"downloads": 0, "likes": 0, "siblings": siblings})

    def _refs(self, call: Call, repo: Repo) -> Response:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()
        ]
        others = ["converts", "tags", *(["pullRequests"] if call.asks("include_prs") else [])]
        return _json({"branches": branches} | {other: [] for other in others})

    def _history(self, call: Call, repo: Repo, revision: str) -> Response:  # noqa: ARG002
        """The branch's commits, the newest first."""
        listed = [
            {"id": c.sha, "title": c.title, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
            for c in reversed(self.commits(repo.kind, repo.name, revision))
        ]
        return _json(listed)

    def _branch(self, call: Call, repo: Repo, revision: str) -> Response:
        with self._lock:
            if revision in repo.branches:
                raise HubError(409, "", f"Reference already exists: {revision}")
            repo.branches[revision] = repo.at(call.json().get("startingPoint", "main")).sha
        return _json({"success": True})

    def _tree(self, call: Call, repo: Repo, revision: str, path: str = "") -> Response:
        entries = _entries(repo.at(revision).files)
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        prefix, deep = path and f"{path}/", call.asks("recursive")
        below = {p: e for p, e in entries.items() if p.startswith(prefix)}
        return _json([e for p, e in below.items() if deep or "/" not in p[len(prefix) :]])

    def _paths_info(self, call: Call, repo: Repo, revision: str) -> Response:
        entries = _entries(repo.at(revision).files)
        paths = parse_qs(call.body.decode()).get("paths", [])
        return _json([entries[path] for path in paths if path in entries])

    def _preupload(self, call: Call, repo: Repo, revision: str) -> Response:
        """Says how to send each file; with the present oid, clients skip what has not changed."""
        present = repo.at(revision).files
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
            address = f"{self.url}/lfs/{oid}?X-Amz-Expires=900&X-Amz-Signature={SIGNATURE}"
            upload = {"actions": {"upload": {"href": address}}}
            objects.append({"oid": oid, "size": size} | ({} if oid in self._objects else upload))
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, call: Call, oid: str) -> Response:
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "", "The bytes do not have the announced sha256")
        with self._lock:
            self._objects[oid] = call.body
            self.uploaded[oid] += 1
        return Response(200)

    def _commit(self, call: Call, repo: Repo, revision: str) -> Response:
        """Applies all operations or none; refused if the branch has left the parent it was built on."""
        header, *operations = (json.loads(line) for line in call.body.splitlines())
        with self._lock:
            if revision not in repo.branches:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if header["value"].get("parentCommit") not in (None, repo.branches[revision]):
                raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(repo.at(revision).files)
            for operation in operations:
                _apply(files, operation["key"], operation["value"], self._objects)
            paths = [operation["value"]["path"] for operation in operations]
            sha = repo.commit(files, header["value"]["summary"], paths, revision)
        url = f"{self.url}/{repo.url_path}/commit/{sha}"
        return _json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Response:
        """A file's bytes. Gating hides these only: as on the Hub, listings stay readable."""
        if repo.gated:
            raise HubError(403, "GatedRepo", f"Access to {repo.kind} {repo.name} is restricted.")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        file = commit.files[path]
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            size = str(len(file.data))
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": size}
        if call.headers.get("If-None-Match") == headers["ETag"]:
            return Response(304, b"", headers)
        return _content(file.data, call.headers.get("Range", ""), headers)


@dataclass
class Route:
    methods: tuple[str, ...]
    path: str
    answer: Callable[..., Response]
    writes: bool = False  # takes a token whatever the repository

    @property
    def step(self) -> str:
        """The name by which faults call it."""
        return self.answer.__name__.removeprefix("_")


_API = "/api/(?P<kinds>models|datasets)/(?P<name>[^/]+/[^/]+)"
_GIT = "/(?:(?P<kinds>datasets)/)?(?P<name>[^/]+/[^/]+)"
_AT = "/(?P<revision>[^/]+)"
_ROUTES = (
    Route(("GET",), "/api/whoami-v2", LoopbackHub._whoami),
    Route(("POST",), "/api/validate-yaml", LoopbackHub._validate_yaml),
    Route(("POST",), "/api/repos/create", LoopbackHub._create, writes=True),
    Route(("GET",), f"{_API}(?:/revision{_AT})?", LoopbackHub._info),
    Route(("GET",), f"{_API}/refs", LoopbackHub._refs),
    Route(("GET",), f"{_API}/commits{_AT}", LoopbackHub._history),
    Route(("POST",), f"{_API}/branch{_AT}", LoopbackHub._branch, writes=True),
    Route(("GET",), f"{_API}/tree{_AT}(?:/(?P<path>.+))?", LoopbackHub._tree),
    Route(("POST",), f"{_API}/paths-info{_AT}", LoopbackHub._paths_info),
    Route(("POST",), f"{_API}/preupload{_AT}", LoopbackHub._preupload, writes=True),
    Route(("POST",), f"{_API}/commit{_AT}", LoopbackHub._commit, writes=True),
    Route(("POST",), rf"{_GIT}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch, writes=True),
    Route(("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", LoopbackHub._lfs_put),
    Route(("GET", "HEAD"), f"{_GIT}/resolve{_AT}/(?P<path>.+)", LoopbackHub._resolve),
)
_STEPS = {route.step for route in _ROUTES}


def _find_route(call: Call) -> tuple[Route, re.Match] | tuple[None, None]:
    path = urlsplit(call.path).path
    for route in _ROUTES:
        match = re.fullmatch(route.path, path)
        if match and call.command in route.methods:
            return route, match
    return None, None
