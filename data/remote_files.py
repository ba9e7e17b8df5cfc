"""Files at URLs, read from the start to the end. A read that is interrupted goes on where it was.

http(s)://, s3:// (with boto3) and hf:// are opened here, since an interrupted download would otherwise cost its shard. Whatever
else webdataset can open (pipe:, gs://, ...), it opens.
"""

import functools
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from webdataset.gopen import gopen

from data.errors import DataError

TIMEOUT = 60  # seconds without a byte
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds between attempts
PASSING = {408, 425, 429}  # HTTP's refusals that may be gone later, beside all from 500


class CannotRead(OSError):
    """A file that does not exist, may not be read, changed meanwhile, or could not be reached in time."""


@dataclass(frozen=True)
class Reply:
    """An open download from some byte on. size: of the whole file in bytes, None if unknown. version: changes with the
    file."""

    body: io.IOBase
    size: int | None
    version: str | None


class RemoteFile(io.RawIOBase):
    """A file that is opened again at its position when a read fails. interruptions: how often that was."""

    def __init__(self, url: str, open_at: Callable[[int], Reply], patience: float):
        """patience: seconds without any progress after which CannotRead is raised."""
        self.url, self.interruptions, self.size = url, 0, None
        self._open_at, self._patience = open_at, patience
        self._reply: Reply | None = None
        self._version, self._position = None, 0
        self._retry(self._open)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all if it is negative; none at the end. Raises CannotRead."""
        if size < 0:
            return b"".join(iter(functools.partial(self.read, 1 << 20), b""))
        data = self._retry(functools.partial(self._read, size))
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        if self._reply is None:
            self._open()
        data = self._reply.body.read(size)
        if not data and size and self.size is not None and self._position < self.size:
            raise ConnectionError(f"ended after {self._position} of {self.size} bytes")
        return data

    def _open(self) -> None:
        reply = self._open_at(self._position)
        if self._position and (reply.version, reply.size) != (self._version, self.size):
            raise CannotRead(f"{self.url} changed while it was read")
        self._reply, self._version, self.size = reply, reply.version, reply.size

    def _retry(self, action: Callable) -> bytes | None:
        """The action's result, tried again while it fails."""
        began, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                return action()
            except CannotRead:
                raise
            except Exception as error:  # of several libraries
                if _permanent(error):
                    raise CannotRead(f"{self.url}: {_reason(error)}") from error
                if time.monotonic() - began + pause > self._patience:
                    raise CannotRead(f"{self.url}: {_reason(error)} for {self._patience:g} s") from error
                self.interruptions += 1
                self._drop()
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _drop(self) -> None:
        if self._reply is not None:
            self._reply.body.close()
        self._reply = None

    def close(self) -> None:
        self._drop()
        super().close()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _permanent(error: Exception) -> bool:
    """Whether the server has answered that it will not send this file."""
    status = error.code if isinstance(error, HTTPError) else None
    if status is None:  # botocore's errors
        response = getattr(error, "response", None)  # a dict of botocore's, or an answer of the hub's client
        about = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = about.get("HTTPStatusCode", getattr(response, "status_code", None))
    if status is None:
        return type(error).__name__ in (
            "NoCredentialsError",
            "ParamValidationError",
            "InvalidURL",
            "RepositoryNotFoundError",
        )
    return 400 <= status < 500 and status not in PASSING


def _open_http(url: str, start: int, token: str | None = None) -> Reply:
    request = Request(url, headers={"User-Agent": "disback"} | ({"Range": f"bytes={start}-"} if start else {}))
    if token:  # not for the storage server that a hub redirects to
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    body = urlopen(request, timeout=TIMEOUT)
    size = body.headers.get("Content-Length")
    if start and body.status == 206:
        size = body.headers["Content-Range"].rpartition("/")[2]
    elif start:  # the server knows no ranges
        left = start
        while left and (data := body.read(min(left, 1 << 20))):
            left -= len(data)
        if left:
            raise ConnectionError(f"ended before byte {start}")
    version = body.headers.get("ETag") or body.headers.get("Last-Modified")
    return Reply(body, int(size) if size and size.isdigit() else None, version)


def _open_hf(url: str, start: int) -> Reply:
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    place = HfFileSystem().resolve_path(url)
    about = {"repo_type": place.repo_type, "revision": place.revision}
    return _open_http(hf_hub_url(place.repo_id, place.path_in_repo, **about), start, get_token())


@functools.cache
def s3_client(process: int):
    """This process's S3 client (a forked process needs its own). Without credentials it reads public buckets."""
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise DataError("s3:// needs boto3: pip install 'disback[s3]'") from error
    session = boto3.session.Session()
    options = {"read_timeout": TIMEOUT, "connect_timeout": 10, "retries": {"max_attempts": 1}}
    if session.get_credentials() is None:
        options["signature_version"] = UNSIGNED
    region = session.region_name or "us-east-1"
    return session.client("s3", config=Config(**options), region_name=region)


def _open_s3(url: str, start: int) -> Reply:
    place = urlsplit(url, allow_fragments=False)
    part = {"Range": f"bytes={start}-"} if start else {}
    found = s3_client(os.getpid()).get_object(Bucket=place.netloc, Key=place.path.lstrip("/"), **part)
    return Reply(found["Body"], start + found["ContentLength"], found.get("ETag"))


OPENERS: dict[str, Callable[[str, int], Reply]] = {
    "http": _open_http,
    "https": _open_http,
    "s3": _open_s3,
    "hf": _open_hf,
}


def open_url(url: str, patience: float) -> io.IOBase:
    """A URL or an absolute path, opened for reading. Raises CannotRead, and DataError if a package is missing."""
    scheme = url.partition(":")[0]
    if scheme in OPENERS:
        return RemoteFile(url, functools.partial(OPENERS[scheme], url), patience)
    try:
        return gopen(url)
    except (OSError, ValueError) as error:
        raise CannotRead(f"{url}: {_reason(error)}") from error
