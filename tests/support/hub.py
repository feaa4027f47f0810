"""A double of the Hugging Face hub: the few endpoints that downloads and uploads use."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by revision; each revision is a commit whose id is made from its files."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False  # files need a token; what there is does not, as on the hub
    private: bool = False  # without the token, it does not exist
    broken: str = ""  # a file whose download ends halfway

    def commit(self, revision: str) -> str | None:
        """Return the id of a revision's commit, or None if there is none."""
        for name, files in self.revisions.items():
            digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (name, digest):
                return digest
        return None

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.commit(revision)
        return next(f for name, f in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """What the double has and what it was asked."""

    url: str
    token: str = "hf_secret"
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # METHOD path
    down: bool = False  # answer 503

    def add(self, name: str, files: Mapping[str, bytes] | Path, **options: Any) -> Repository:
        """Add a repository whose main branch has these files, or those of a folder."""
        if isinstance(files, Path):
            found = sorted(file for file in files.rglob("*") if file.is_file())
            files = {file.relative_to(files).as_posix(): file.read_bytes() for file in found}
        self.repositories[name] = Repository({"main": dict(files)}, **options)
        return self.repositories[name]

    def fetched(self) -> set[str]:
        """Return the paths of all files whose content was asked for."""
        found = (re.search(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.*)", line) for line in self.requests)
        return {unquote(match[1]) for match in found if match}


@contextmanager
def hub_double() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        given = self.headers.get("Authorization")
        if self.hub.down:
            return self._send(503, b"")
        if given not in (None, f"Bearer {self.hub.token}"):
            message = "Invalid credentials in Authorization header"
            return self._send(401, b"", {"X-Error-Message": message})
        if self.command == "POST":
            return self._post(path, body, given is not None)
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, path):
                name, revision, *rest = (each and unquote(each) for each in match.groups())
                repository = self.hub.repositories.get(str(name))
                if repository is None or (repository.private and given is None):
                    return self._send(401, b"", {"X-Error-Message": "Invalid username or password"})
                if repository.commit(revision or "main") is None:
                    return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return answer(repository, revision or "main", *map(str, rest))
        self._send(404, b"")

    def _info(self, repository: Repository, revision: str) -> None:
        siblings = [{"rfilename": name} for name in repository.files(revision)]
        about = {"id": "x/y", "sha": repository.commit(revision), "siblings": siblings}
        self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _tree(self, repository: Repository, revision: str) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(body), "oid": _sha1(body)}
            for name, body in repository.files(revision).items()
        ]
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        if repository.gated and "Authorization" not in self.headers:
            return self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        commit = str(repository.commit(revision))
        body = repository.files(revision).get(path)
        if body is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self._send(404, b"", headers)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha1(body)}"'}
        if path == repository.broken and self.command == "GET":
            self._send(200, body[: len(body) // 2], headers, len(body))
            self.close_connection = True
            return
        self._send(200, body, headers)

    def _post(self, path: str, body: bytes, known: bool) -> None:
        if not known:
            return self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._json(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization") or "me", asked["name"]]))
            if asked.get("organization") == "others":
                return self._send(403, b"", {"X-Error-Message": "no rights in this namespace"})
            if name in self.hub.repositories:
                return self._json(409, {"url": f"{self.hub.url}/{name}", "id": name})
            self.hub.add(name, {}, private=asked.get("visibility") == "private")
            return self._json(200, {"url": f"{self.hub.url}/{name}", "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
            name, what, _ = match.groups()
            files = self.hub.repositories[name].revisions["main"]
            if what == "preupload":
                asked = json.loads(body)["files"]
                plan = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in asked
                ]
                return self._json(200, {"files": plan})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    files.pop(line["value"]["path"], None)
            commit = str(self.hub.repositories[name].commit("main"))
            url = f"{self.hub.url}/{name}/commit/{commit}"
            return self._json(200, {"commitUrl": url, "commitOid": commit, "success": True})
        self._send(404, b"")

    def _json(self, status: int, content: object) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha1(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
