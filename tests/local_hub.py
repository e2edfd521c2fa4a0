"""A Hugging Face Hub on this machine, as much of it as data/hub.py asks for; HF_ENDPOINT names it."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories):
    """repositories: {"owner/name": {path: bytes}}. Yields the server.

    Its `endpoint` is the URL, `damage` a path that it sends with a wrong first byte, `gone` one that it
    says it does not have, and `requests` what it was asked for.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            server.requests.append((self.command, self.path))
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                self.answer(self.about(match[1], repositories[match[1]]) if match[1] in repositories else None)
            elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
                files = repositories[match[1]].items()
                self.answer([entry(name, content) for name, content in files if name.startswith(match[2])])
            elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
                self.send_file(match[2], repositories[match[1]].get(match[2]))
            else:
                self.answer(None)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            files = repositories[re.match(r"/api/datasets/([^/]+/[^/]+)/", self.path)[1]]
            found = [entry(path, files[path]) for path in wanted if path in files]
            folders = {path for path in wanted if any(name.startswith(path + "/") for name in files)}
            self.answer(found + [{"type": "directory", "path": path, "oid": COMMIT} for path in folders])

        def about(self, name, files):
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            for sibling, content in zip(siblings, files.values(), strict=True):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            rest = {"_id": "0", "private": False, "tags": [], "downloads": 0}
            return {"id": name, "sha": COMMIT, "siblings": siblings, **rest}

        def answer(self, content):
            body = json.dumps({"error": "not found"} if content is None else content).encode()
            self.send(404 if content is None else 200, {"Content-Type": "application/json"}, body)

        def send(self, status, headers, body):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_file(self, path, content):
            if content is None or path == server.gone:
                return self.answer(None)
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            headers["Accept-Ranges"] = "bytes"
            if path == server.damage:
                content = bytes([content[0] ^ 1]) + content[1:]
            start, end = 0, len(content)
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(wanted[1]), min(int(wanted[2] or end) + 1, end)
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self.send(206 if wanted else 200, headers, content[start:end])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.damage, server.gone, server.requests = None, None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def entry(path, content):
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": path, "size": len(content), "oid": digest[:40], "lfs": lfs}
