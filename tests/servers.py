"""Servers of a folder's files in processes of their own, which can be killed and started again: HTTP, with and without ranges,
and S3 (moto's server)."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from functools import partial
from pathlib import Path


class Server:
    """A server process on a port that stays the same. kind: "http" (Python's own, which knows no ranges), "ranges" or "s3"."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder, self.process = kind, folder, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        call = [sys.executable, __file__, self.kind, str(self.port), str(self.folder)]
        self.process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(self.address, timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)

    def kill(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.process = None

    def url(self, pattern: str) -> str:
        return f"s3://shards/train/{pattern}" if self.kind == "s3" else f"{self.address}/{pattern}"


class Ranges(http.server.SimpleHTTPRequestHandler):
    """With ranges; SLOW in the environment is the pause in seconds after every 4 kB."""

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(200 if file.is_dir() else 404)
            return
        raw, start = file.read_bytes(), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{zlib.crc32(raw)}"')
        self.send_header("Content-Length", str(len(raw) - start))
        self.end_headers()
        for low in range(start, len(raw), 4096):
            self.wfile.write(raw[low : low + 4096])
            time.sleep(float(os.environ.get("SLOW", "0")))


def serve_s3(port: int, folder: Path) -> None:
    """moto's server keeps its buckets in memory: it is filled before it answers."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket("shards", "us-east-1")
    for file in sorted(folder.glob("*.tar")):
        backend.put_object("shards", f"train/{file.name}", file.read_bytes())
    run_simple("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), threaded=True)


if __name__ == "__main__":
    kind, port, folder = sys.argv[1:]
    if kind == "s3":
        serve_s3(int(port), Path(folder))
    else:
        handler = Ranges if kind == "ranges" else http.server.SimpleHTTPRequestHandler
        http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), partial(handler, directory=folder)).serve_forever()
