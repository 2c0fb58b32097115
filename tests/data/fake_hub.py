"""A server with the hub's interface over a local folder, for the hub's own client."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections import Counter

REPO = "someone/some-text"
COMMIT = "0123456789" * 4
BLOCK = 1 << 16


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves folder/<owner>/<name>/... at `url`, without Xet. `opened`: (file's name, first byte asked for) of every
    download, `asked`: how often each path was asked for. `dies_after`: bytes of files after which every connection
    breaks; `breaks`: every n-th answer stops in its middle; `pause`: seconds between two blocks; `lie`: the
    SHA-256 that it states of every file."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.opened, self.asked, self.sent = [], Counter(), 0
        self.dies_after = self.breaks = self.lie = None
        self.pause, self.lock = 0, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def file(self, name):
        return f"{self.url}/datasets/{REPO}/resolve/{COMMIT}/{name}"

    def handle_error(self, request, client_address):
        pass  # a client that was killed

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked[path] += 1
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+)/?(.*))?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if not found or not (hub.folder / found[1]).is_dir() or found[2] not in (None, "main", COMMIT):
            self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif not (target := hub.folder / found[1] / (found[3] or "")).exists():
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        elif file:
            self.send_file(target)
        elif "/tree/" in path:
            files = sorted(p for p in target.rglob("*") if p.is_file())
            self.answer(json.dumps([self.entry(p, hub.folder / found[1]) for p in files]).encode())
        else:
            self.answer(json.dumps({"id": found[1], "sha": COMMIT}).encode())

    def do_HEAD(self):
        self.answer(b"", 404)

    def entry(self, path, root):
        data = path.read_bytes()
        lfs = {"oid": self.server.lie or hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        name = path.relative_to(root).as_posix()
        return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}

    def send_file(self, path):
        hub, data = self.server, path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        with hub.lock:
            hub.opened.append((path.name, start))
            breaks = hub.breaks and len(hub.opened) % hub.breaks == 0
        self.answer(b"", 206 if start else 200, {"Content-Length": str(len(data) - start)})
        with contextlib.suppress(OSError):
            end = start + (len(data) - start) // 2 if breaks else len(data)
            while start < end:
                block = data[start : min(start + BLOCK, end)]
                with hub.lock:
                    if hub.dies_after is not None:
                        block = block[: hub.dies_after]
                        hub.dies_after -= len(block)
                    hub.sent += len(block)
                if not block:
                    return
                self.wfile.write(block)
                start += len(block)
                threading.Event().wait(hub.pause)

    def answer(self, data, status=200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass
