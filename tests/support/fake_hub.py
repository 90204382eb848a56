"""A Hugging Face hub on loopback with one repository, for the real client to speak to."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

REPOSITORY = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """The hub's address and the paths that were asked for, growing."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked.append(path)
            status, headers, body = _answer(path, files)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 the base class' own naming

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(path: str, files: dict[str, bytes]) -> tuple[int, dict[str, str], bytes]:
    api, tree, resolve = (
        f"/api/models/{REPOSITORY}/revision/",
        f"/api/models/{REPOSITORY}/tree/",
        f"/{REPOSITORY}/resolve/{COMMIT}/",
    )
    if path in (f"{api}main", f"{api}{COMMIT}"):
        return _json({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
    if path.startswith(tree):
        return _json([{"type": "file", "path": name, "size": len(body), "oid": _id(body)} for name, body in files.items()])
    name = path.removeprefix(resolve)
    if path.startswith(resolve) and name in files:
        return 200, {"ETag": f'"{_id(files[name])}"', "X-Repo-Commit": COMMIT}, files[name]
    code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
    return 404, {"X-Error-Code": code, "X-Error-Message": "not there"}, b"{}"


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _id(body: bytes) -> str:
    return sha1(body).hexdigest()
