"""A small hub on this machine: the requests that an upload by huggingface_hub makes, answered as the real one does."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by name."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Hub(ThreadingHTTPServer):
    """It has one repository, me/tiny. mode: how *.safetensors are to be uploaded, "regular" or "lfs". answers: status and body
    instead of the usual answer, by the end of a path. files: what was committed, by name."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.mode, self.answers = "regular", {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.commits: list[str] = []

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["Hub"]:
        server = cls()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.stop()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    @property
    def hashes(self) -> dict[str, str]:
        """As `hashes`, of what was committed."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    """One request to a `Hub`."""

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "Repository not found"}, 404)

    def do_POST(self) -> None:
        hub, body, path = self.server, self._body(), self.path.partition("?")[0]
        for end, (status, answer) in hub.answers.items():
            if path.endswith(end):
                return self._answer(answer, status)
        if path == "/api/repos/create":
            hub.created.append(json.loads(body) | {"token": self.headers["Authorization"]})
            self._answer({"url": f"{hub.address}/me/tiny"})
        elif path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif path == "/api/models/me/tiny/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: hub.mode if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "shouldIgnore": False, "uploadMode": mode} for name, mode in modes.items()]
            self._answer({"files": files})
        elif path == "/me/tiny.git/info/lfs/objects/batch":
            found = json.loads(body)["objects"]
            links = [o | {"actions": {"upload": {"href": f"{hub.address}/object/{o['oid']}"}}} for o in found]
            self._answer({"transfer": "basic", "objects": links})
        elif path == "/api/models/me/tiny/commit/main":
            for line in (json.loads(line) for line in body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            self._answer({"commitUrl": f"{hub.address}/me/tiny/commit/{'b' * 40}", "commitOid": "b" * 40})
        else:
            self._answer({"error": f"unknown {path}"}, 404)
