"""A model hub on loopback: the part of huggingface.co's protocol that hf_hub_download speaks, for one repository.

The client requests HEAD /REPOSITORY/resolve/main/FILE for the commit, the ETag (the file's SHA-256) and the length, then
GETs the same address, or goes on with a Range of it. Errors name their kind in X-Error-Code. `behaviour` chooses what
goes wrong.
"""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

REFUSALS = {"forbidden": 403, "blocked": 451, "limited": 429, "broken": 500}  # for each request


class HubServer(ThreadingHTTPServer):
    """with HubServer("timm/test_vit.r160_in1k", {"model.safetensors": bytes}) as hub: HF_ENDPOINT=hub.url"""

    daemon_threads = True

    def __init__(self, repository, files, behaviour="normal"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, self.files, self.behaviour = repository, files, behaviour
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests = []
        self.closing = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()  # ends the connections that stall
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Retry-After", "30")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def redirect(self, url, data):
        """To where the bytes are, as the hub does for large files."""
        self.send_response(302)
        self.send_header("Location", url)
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        prefix = f"/{hub.repository}/resolve/main/"
        if hub.behaviour == "stall":
            hub.closing.wait()
        elif hub.behaviour == "gated":
            self.refuse(401, "GatedRepo")
        elif hub.behaviour in REFUSALS or hub.behaviour == "token" and "Authorization" in self.headers:
            self.refuse(REFUSALS.get(hub.behaviour, 401), "")
        elif hub.behaviour == "moved":  # as a mirror does: without the hub's headers
            self.send_response(308)
            self.send_header("Location", "http://127.0.0.1:9" + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif hub.behaviour == "missing" or not self.path.startswith(prefix):
            self.refuse(404, "RepoNotFound")
        elif self.path.removeprefix(prefix) not in hub.files:
            self.refuse(404, "EntryNotFound")
        elif hub.behaviour == "storage out of reach":
            self.redirect("http://127.0.0.1:9/storage", hub.files[self.path.removeprefix(prefix)])
        else:
            self.send_file(hub.files[self.path.removeprefix(prefix)])

    def send_file(self, data):
        hub = self.server
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if hub.behaviour != "no commit":
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.behaviour in ("stall half-way", "truncated"):
            self.wfile.write(data[start : start + 1000])
            self.wfile.flush()
            if hub.behaviour == "stall half-way":
                hub.closing.wait()
            self.close_connection = True
        elif hub.behaviour == "slow":  # so that a progress bar has something to show
            for begin in range(start, len(data), len(data) // 8):
                self.wfile.write(data[begin : begin + len(data) // 8])
                time.sleep(0.1)
        else:
            self.wfile.write(data[start:])
