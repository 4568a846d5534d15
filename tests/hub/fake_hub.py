"""The part of the Hub that publishing talks to, in memory, on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

KINDS = ("models", "datasets")


@dataclass
class Repo:
    kind: str
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def sha(self, revision: str) -> str:
        files = sorted(self.branches[revision].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def find(self, revision: str) -> dict[str, bytes] | None:
        for branch in self.branches:
            if revision in (branch, self.sha(branch)):
                return self.branches[branch]
        return None


@dataclass
class FakeHub:
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse_with: int | None = None


@contextmanager
def serve(hub: FakeHub) -> Iterator[str]:
    """Serve it; gives the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def send(self, status: int, body: object = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(self.path.split("?")[0]).strip("/")
            hub.requests.append(f"{self.command} {path}")
            if hub.refuse_with is not None and not path.startswith("api/agent"):
                return self.send(hub.refuse_with)
            if path == "api/repos/create":
                return self.create(json.loads(body))
            if path == "api/validate-yaml":
                return self.send(200, {"errors": [], "warnings": []})
            match = re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(\w+))?(?:/(.*))?", path)
            if match:
                return self.api(*match.groups(), body)
            match = re.fullmatch(r"(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
            if match:
                return self.resolve(*match.groups())
            self.send(404)

        do_GET = do_POST = do_HEAD = handle_any

        def create(self, asked: dict) -> None:
            repo_id = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private", False)
            answer = {"url": f"{endpoint}/{repo_id}", "name": repo_id}
            if repo_id in hub.repos:
                return self.send(409, answer)
            hub.repos[repo_id] = Repo(asked.get("type", "model") + "s", private)
            self.send(200, answer)

        def api(self, kind: str, repo_id: str, verb: str | None, rest: str | None, body: bytes):
            repo = hub.repos.get(repo_id)
            if repo is None or repo.kind != kind:
                return self.send(404, X_Error_Code="RepoNotFound")
            if verb == "branch":
                repo.branches.setdefault(str(rest), dict(repo.branches["main"]))
                return self.send(200, {})
            revision = (rest or "main").split("/")[0]
            files = repo.find(revision)
            if files is None:
                return self.send(404, X_Error_Code="RevisionNotFound")
            if verb == "preupload":
                asked = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in asked
                ]
                return self.send(200, {"files": modes})
            if verb == "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        files[value["path"]] = base64.b64decode(value["content"])
                sha = repo.sha(revision)
                url = f"{endpoint}/{repo_id}/commit/{sha}"
                return self.send(200, {"success": True, "commitUrl": url, "commitOid": sha})
            if verb == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": name}
                    for name, data in files.items()
                ]
                return self.send(200, entries)
            branch = next(b for b in repo.branches if repo.branches[b] is files)
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "modelId": repo_id, "sha": repo.sha(branch)}
            self.send(200, info | {"private": repo.private, "siblings": siblings})

        def resolve(self, repo_id: str, revision: str, name: str) -> None:
            repo = hub.repos.get(repo_id)
            files = repo.find(revision) if repo else None
            if repo is None or files is None:
                return self.send(404, X_Error_Code="RevisionNotFound" if repo else "RepoNotFound")
            if name not in files:
                return self.send(404, X_Error_Code="EntryNotFound")
            branch = next(b for b in repo.branches if repo.branches[b] is files)
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            self.send(200, files[name], ETag=etag, X_Repo_Commit=repo.sha(branch))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
