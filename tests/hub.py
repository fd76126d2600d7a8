"""A stand-in for the Hugging Face hub: one HTTP server, whose repositories are folders.

It answers what huggingface_hub asks to download a model: the repository's info and tree, and its files with ETag,
commit, length and ranges. What was asked is kept in `requests`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Repo:
    """revisions: {branch or tag: folder}. gated: only this token may have files. private: only it may see anything."""

    revisions: dict[str, Path]
    gated: str | None = None
    private: str | None = None

    def folder(self, revision: str) -> Path | None:
        by_commit = {commit(folder): folder for folder in self.revisions.values()}
        return self.revisions.get(revision) or by_commit.get(revision)


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    range: str | None


def commit(folder: Path) -> str:
    """Forty hex digits for the state of a folder."""
    state = hashlib.sha1()
    for file in files(folder):
        state.update(f"{file}\n".encode() + (folder / file).read_bytes())
    return state.hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Hub:
    """`with Hub() as hub: hub.repos["org/name"] = Repo(...)`; it listens at `hub.endpoint`.

    break_off: {file: number of times that its download breaks off in the middle}.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.break_off: dict[str, int] = {}

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, name: str, folder: Path, **options: Any) -> None:
        """A repository with one branch."""
        self.repos[name] = Repo(revisions={"main": folder}, **options)

    def fetched(self) -> list[str]:
        """The files that were sent, in whole or in part, sorted."""
        sent = (re.search(r"/resolve/[^/]+/(.*)", r.path) for r in self.requests if r.method == "GET")
        return sorted(match[1] for match in sent if match)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path = self.path.partition("?")[0]
        self.hub.requests.append(Request(self.command, path, token, self.headers.get("Range")))
        if token == "revoked":
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        match = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?|/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path
        )
        if match is None:
            return self.refuse(404, "EntryNotFound")
        name, kind, revision = match[1] or match[4], match[2] or match[5] or "revision", match[3] or match[6] or "main"
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private is not None and token != repo.private):
            return self.refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        folder = repo.folder(revision.replace("%2F", "/"))
        if folder is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "revision":
            return self.send_json({"id": name, "sha": commit(folder), "siblings": siblings(folder), "private": False})
        if kind == "tree":
            return self.send_json(tree(folder))
        if repo.gated is not None and token != repo.gated:
            return self.refuse(401 if token is None else 403, "GatedRepo", "Access to this repository is restricted")
        if not (folder / match[7]).is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        self.send_file(folder, match[7])

    def refuse(self, status: int, code: str | None, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, folder: Path, file: str) -> None:
        content = (folder / file).read_bytes()
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit(folder))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start:]
        if self.hub.break_off.get(file, 0):
            self.hub.break_off[file] -= 1
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)


def siblings(folder: Path) -> list[dict]:
    return [{"rfilename": file} for file in files(folder)]


def tree(folder: Path) -> list[dict]:
    return [
        {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": commit(folder)}
        for file in files(folder)
    ]
