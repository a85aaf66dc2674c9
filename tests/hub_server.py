"""A model hub on localhost, in memory, for the real huggingface_hub: just what a push and a load ask for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WEIGHTS = (".safetensors", ".bin", ".gguf")
# What a Fault may do in the place of a status
CUT = 0  # closes the connection
HALF = 1  # closes it in the middle of the answer
RESET = 2  # resets the connection
MIDWAY = 3  # resets it in the middle of the request
SILENT = 4  # says nothing until the client has gone


@dataclass
class Fault:
    """``times`` requests answered with ``status`` or not at all; what one asked may take effect even so."""

    method: str
    path: str
    status: int
    times: int = 1
    takes_effect: bool = False


Commit = tuple[str, str, dict[str, bytes]]


@dataclass
class Repository:
    """The commits of its branches, newest last: (commit, title, files by name)."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def commits(self) -> list[Commit]:
        """Those of the main branch."""
        return self.branches["main"]

    def commit(self, title: str, files: dict[str, bytes], branch: str = "main") -> str:
        name = hashlib.sha1(f"{branch}{len(self.branches[branch])}{title}".encode()).hexdigest()
        self.branches[branch].append((name, title, files))
        return name

    def until(self, revision: str) -> list[Commit]:
        """The commits up to the one that a branch or a commit names."""
        revision = self.tags.get(revision, revision)
        for name, commits in self.branches.items():
            for number, commit in enumerate(commits, 1):
                if revision == commit[0] or (revision == name and number == len(commits)):
                    return commits[:number]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub:
    """The server; ``tokens`` maps a token to (owner, role)."""

    def __init__(self, tokens: dict[str, tuple[str, str]]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.paths: list[str] = []
        self.fault_at: dict[int, Fault] = {}
        """A fault by the number of the request, counted in ``paths``."""
        self.lock = threading.Lock()
        handler = type("Bound", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.server.server_close()


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, words: str, code: str = "", url: str = "") -> None:
        super().__init__(words)
        self.status, self.words, self.code, self.url = status, words, code, url


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Head and body go apart; the client would wait 40 ms for the second.
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self._fault(path)
        if fault and fault.status == MIDWAY:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self._reset()
            return
        body = self._read()
        try:
            with self.hub.lock:
                found = self._route(path, body) if fault is None or fault.takes_effect else None
            if fault and fault.status < 100:
                self._break_off(fault.status, found)
                return
            if fault:
                raise Refused(fault.status, "fault")
            content, headers = found if isinstance(found, tuple) else (json.dumps(found).encode(), {})
            headers.setdefault("Content-Type", "application/json")
            self._answer(200, content, headers)
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.words, **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self._answer(refusal.status, json.dumps({"error": refusal.words, "url": refusal.url}).encode(), headers)

    def _fault(self, path: str) -> Fault | None:
        """What is to go wrong with this request, which is counted."""
        self.hub.paths.append(f"{self.command} {self.path}")
        fault = self.hub.fault_at.pop(len(self.hub.paths) - 1, None)
        fault = fault or next(
            (f for f in self.hub.faults if f.times and f.method == self.command and f.path in path), None
        )
        if fault:
            fault.times -= 1
        return fault

    def _break_off(self, how: int, found: Any) -> None:
        """End without an answer, or with half of it."""
        if how == HALF:
            content = json.dumps(found).encode() if not isinstance(found, tuple) else found[0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 10))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
        if how == SILENT:
            self.connection.recv(1)
        if how == RESET:
            self._reset()
        else:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _user(self) -> tuple[str, str] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repository(self, name: str, write: bool = False) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and user is None):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (user is None or user != (name.split("/")[0], "write")):
            raise Refused(403, f"you don't have write access to {name}")
        return repository

    def _route(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if blob := re.fullmatch(r"/blobs/(\w+)", path):
            if self.command == "PUT":
                self.hub.blobs[blob[1]] = body
                return b"", {}
            return self.hub.blobs[blob[1]], {}
        if batch := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repository(batch[1], write=True)
            return self._lfs(json.loads(body)), {"Content-Type": "application/vnd.git-lfs+json"}
        if api := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+).*)?)?", path):
            write = self.command == "POST" and api[2] != "paths-info"
            return self._api(self._repository(api[1], write), api[1], api[2] or "revision", api[3] or "main", body)
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(self._repository(file[1]), file[2], file[3])
        raise Refused(404, f"no route for {self.command} {path}")

    def _create(self, wanted: dict[str, Any]) -> Any:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or user[0]}/{wanted['name']}"
        if user != (name.split("/")[0], "write"):
            raise Refused(403, f"you don't have the rights to create {name}")
        if name in self.hub.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit("initial commit", {".gitattributes": b""})
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def _lfs(self, wanted: dict[str, Any]) -> bytes:
        objects = []
        for item in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/blobs/{item['oid']}", "header": {}}}
            known = item["oid"] in self.hub.blobs
            objects.append({"oid": item["oid"], "size": item["size"], **({} if known else {"actions": upload})})
        return json.dumps({"transfer": "basic", "objects": objects}).encode()

    def _api(self, repository: Repository, name: str, what: str, revision: str, body: bytes) -> Any:
        if what == "branch":
            if revision in repository.branches:
                raise Refused(409, "Reference already exists")
            repository.branches[revision] = list(repository.commits)
            return {}
        if what == "refs":
            heads = {name: commits[-1][0] for name, commits in repository.branches.items()}
            return {
                kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": c} for n, c in found.items()]
                for kind, place, found in (("branches", "heads", heads), ("tags", "tags", repository.tags))
            } | {"converts": []}
        commits = repository.until(revision)
        commit, _, files = commits[-1]
        if what == "tag":
            name_of_tag = json.loads(body)["tag"]
            if name_of_tag in repository.tags:
                raise Refused(409, "Tag reference exists already")
            repository.tags[name_of_tag] = commit
            return {}
        if what == "revision":
            siblings = [{"rfilename": file} for file in sorted(files)]
            return {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings,
                    "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        if what == "commits":
            return [
                {"id": id_, "title": title, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
                for id_, title, _ in reversed(commits)
            ]
        if what == "tree":
            return [_entry(file, data) for file, data in sorted(files.items())]
        if what == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return [_entry(file, files[file]) for file in asked if file in files]
        if what == "preupload":
            asked = json.loads(body)["files"]
            return {"files": [
                {"path": f["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if f["path"].endswith(WEIGHTS) else "regular"} for f in asked
            ]}  # fmt: skip
        if what == "commit":
            return self._commit(name, revision, dict(files), commit, body)
        raise Refused(404, f"no route for {what}")

    def _commit(self, name: str, branch: str, files: dict[str, bytes], head: str, body: bytes) -> Any:
        title = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, "A commit has happened since.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        made = self.hub.repositories[name].commit(title, files, branch)
        return {"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"}

    def _file(self, repository: Repository, revision: str, name: str) -> Any:
        commit, _, files = repository.until(revision)[-1]
        if name not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = files[name]
        etag = hashlib.sha256(data).hexdigest()
        return data, {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file in a listing; of one in LFS also what it holds, by its SHA-256."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(WEIGHTS):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
