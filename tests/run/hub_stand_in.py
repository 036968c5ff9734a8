"""Behaves as the Hugging Face Hub does where huggingface_hub's client (2.4, read and run) pushes to it, over HTTP:
repositories, branches, large files by Git LFS, commits. What the client would send through Xet's own protocol goes by
LFS here, which it takes where HF_HUB_DISABLE_XET is set.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_" + "a" * 34


@dataclass
class Repo:
    """Branches hold commits: (id, files by name)."""

    private: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)

    def newest(self, branch: str) -> tuple[str, dict[str, bytes]]:
        return self.branches[branch][-1]


class HubStandIn(ThreadingHTTPServer):
    """`refuse` maps the beginning of "METHOD /path" to the status and the message with which it is answered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.owners = {"ada"}
        self.objects: dict[str, bytes] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        self.seen: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository that is there before."""
        self.repos[name] = Repo(private, {"main": [(_id(name, files), files)]})
        return self.repos[name]


def _id(*what: object) -> str:
    return hashlib.sha1(repr(what).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn

    def log_message(self, *_: Any) -> None:
        return None

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.server.seen.append(f"{self.command} {path}")
        for beginning, (status, message) in self.server.refuse.items():
            if f"{self.command} {path}".startswith(beginning):
                return self._send(status, {"error": message})
        if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        for pattern, answer in _ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, body, *found.groups())
        return self._send(404, {"error": "no such page"})

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def info(self, body: bytes, name: str, branch: str | None = None) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if (branch or "main") not in repo.branches:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        commit, files = repo.newest(branch or "main")
        siblings = [{"rfilename": file} for file in files]
        return self._send(200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.server.owners:
            return self._send(
                403, {"error": f"You don't have the rights to create a model under {asked['organization']}"}
            )
        if name in self.server.repos:
            return self._send(409, {"error": "You already created this model repo"})
        self.server.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, asked.get("visibility") == "private")
        return self._send(200, {"url": f"{self.server.address}/{name}"})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repo = self.server.repos[name]
        if branch in repo.branches:
            return self._send(409, {"error": "Reference already exists"})
        repo.branches[branch] = list(repo.branches["main"])
        return self._send(200, {})

    def card(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        front = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        base = front.get("base_model", "a/b")
        if not isinstance(front, dict) or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return self._send(400, {"errors": [{"message": '"base_model" with value is not valid'}], "warnings": []})
        return self._send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, branch: str) -> None:
        _, files = self.server.repos[name].newest(branch)
        found = []
        for asked in json.loads(body)["files"]:
            mode = "lfs" if asked["path"].endswith((".safetensors", ".gguf")) else "regular"
            there = files.get(asked["path"])
            blob = hashlib.sha1(b"blob %d\0%s" % (len(there), there)).hexdigest() if there is not None else None
            oid = blob if mode == "regular" or there is None else hashlib.sha256(there).hexdigest()
            found.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._send(200, {"files": found})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {
                "oid": asked["oid"], "size": asked["size"],
                "actions": {"upload": {"href": f"{self.server.address}/objects/{asked['oid']}"}},
            }
            for asked in json.loads(body)["objects"]
        ]  # fmt: skip
        return self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "another content"})
        self.server.objects[oid] = body
        return self._send(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        before, files = self.server.repos[name].newest(branch)
        if lines[0]["value"].get("parentCommit", before) != before:
            return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(files)
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        commit = _id(before, lines[0], sorted(files))
        self.server.repos[name].branches[branch].append((commit, files))
        return self._send(200, {"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit})

    def file(self, body: bytes, name: str, commit: str, file: str) -> None:
        if name not in self.server.repos:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        for commits in self.server.repos[name].branches.values():
            for known, files in commits:
                if known == commit and file in files:
                    headers = {"ETag": f'"{_id(files[file])}"', "X-Repo-Commit": commit}
                    return self._send(200, files[file], headers)
        return self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    rf"GET /api/models/{_NAME}": _Handler.info,
    rf"GET /api/models/{_NAME}/revision/(.+)": _Handler.info,
    r"POST /api/repos/create": _Handler.create,
    rf"POST /api/models/{_NAME}/branch/(.+)": _Handler.branch,
    r"POST /api/validate-yaml": _Handler.card,
    rf"POST /api/models/{_NAME}/preupload/(.+)": _Handler.preupload,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /objects/(\w+)": _Handler.store,
    rf"POST /api/models/{_NAME}/commit/(.+)": _Handler.commit,
    rf"(?:GET|HEAD) /(?:datasets/)?{_NAME}/resolve/([\w.-]+)/(.+)": _Handler.file,
}
"""METHOD /path -> what answers it."""
