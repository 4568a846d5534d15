"""A Hub on this machine that knows one repository, and how the real one says no."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_ERRORS = {
    "acme/gated": (403, "GatedRepo"),
    "acme/missing": (404, "RepoNotFound"),
    "acme/down": (500, None),
}


@contextmanager
def fake_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as `acme/tiny`; gives the endpoint, and the list of files asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/api/models/").strip("/")
            for repo, (status, code) in _ERRORS.items():
                if path.startswith(repo):
                    return self.answer(status, **({"X_Error_Code": code} if code else {}))
            if path.startswith(f"{REPO}/resolve/"):
                name = path.removeprefix(f"{REPO}/resolve/{COMMIT}/")
                asked.append(name)
                body = (folder / name).read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                return self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT)
            if path.startswith(f"{REPO}/tree/"):
                entries = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in sorted(folder.iterdir())
                ]
                return self.answer(200, json.dumps(entries).encode())
            if path in (REPO, f"{REPO}/revision/main", f"{REPO}/revision/{COMMIT}"):
                siblings = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
                info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(info).encode())
            self.answer(404, X_Error_Code="RevisionNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
