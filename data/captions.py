"""What a caption is, and captions files: captions of a folder's images by name."""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from data.errors import DataError

KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
LONGEST = 100_000  # characters; tokenizers take seconds for more
SEVERAL_CAPTIONS = "several captions in the captions file"
SHARED_NAME = "in the captions file by a bare name that several images have"


def clean_caption(value: object) -> str:
    """A caption from a string or UTF-8 bytes, without byte order marks and outer white space.

    Raises ValueError for what is no caption (empty text, null, a list, a NUL character, ...); the message is the reason
    under which the sample is counted.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("caption is not UTF-8") from error
    if not isinstance(value, str):
        raise ValueError(f"caption is {KINDS.get(type(value), 'an object')}, not text")
    text = value.replace("\ufeff", "").strip()
    if not text:
        raise ValueError("empty caption")
    if "\0" in text:
        raise ValueError("caption has a NUL character")
    if len(text) > LONGEST:
        raise ValueError(f"caption of more than {LONGEST:,} characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("caption has half a surrogate pair") from error
    return text


class Captions:
    """The captions of a folder's images, from the entries of a captions file and the .txt next to the images.

    An entry belongs to the image with its path below the folder, or else, if it is a bare name, to the only image of that
    name in any folder. Names match as they are, or else in Unicode's composed form: macOS writes decomposed names.
    `unused`: entries that have not given an image its caption.
    """

    def __init__(self, entries: dict[str, list[object]], images: Sequence[str]):
        """entries: as from read_captions. images: their paths below the folder, with slashes."""
        self._entries, self.unused = entries, set(entries)
        self._by_path = {image: image for image in images if image in entries}
        self._by_name: dict[str, str] = {}
        self._shared: set[str] = set()
        others = [entry for entry in entries if entry not in self._by_path]
        composed = _grouped([image for image in images if image not in self._by_path], _nfc)
        names = _grouped(images, lambda image: _nfc(_name(image)))
        for entry in others:
            alike = composed.get(_nfc(entry), [])
            if alike:
                if len(alike) == 1:
                    self._by_path.setdefault(alike[0], entry)
            else:
                namesakes = names.get(_nfc(entry), [])
                namesakes = [image for image in namesakes if _name(image) == entry] or namesakes
                if len(namesakes) == 1:
                    self._by_name.setdefault(namesakes[0], entry)
                else:
                    self._shared.update(namesakes)

    def of(self, image: str, beside: Path | None) -> str:
        """An image's caption: its entry by path, or the .txt next to it (`beside`), or its entry by bare name.

        Raises ValueError with the reason if it has none that is clearly its own, OSError if the .txt cannot be read.
        """
        if entry := self._by_path.get(image):
            return self._take(entry)
        if beside:
            return clean_caption(beside.read_bytes())
        if entry := self._by_name.get(image):
            return self._take(entry)
        raise ValueError(SHARED_NAME if image in self._shared else "no caption")

    def _take(self, entry: str) -> str:
        self.unused.discard(entry)
        captions = self._entries[entry]
        if len(captions) > 1:
            raise ValueError(SEVERAL_CAPTIONS)
        return clean_caption(captions[0])


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _grouped(images: Sequence[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for image in images:
        groups.setdefault(key(image), []).append(image)
    return groups


def read_captions(file: Path) -> dict[str, list[object]]:
    """The distinct captions of each name, as they are written, from .json ({name: caption}), .jsonl (one {"file",
    "caption"} per line) or .tsv (name, tab, caption per line). Raises DataError naming the line."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".tsv": _read_tsv}
    suffix = file.suffix.lower()
    if suffix not in readers:
        raise DataError(f"captions file {file}: unknown format {suffix or '(no extension)'}: use {', '.join(readers)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"captions file {file}: {error.strerror}: check --captions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"captions file {file}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    entries: dict[str, list[object]] = {}
    for name, caption in readers[suffix](file, text):
        known = entries.setdefault(PurePosixPath(name).as_posix(), [])  # without a leading ./
        if caption not in known:
            known.append(caption)
    return entries


Entries = Iterator[tuple[str, object]]


def _read_json(file: Path, text: str) -> Entries:
    try:
        # An object as a tuple of its pairs, not as a dict, which keeps only the last caption of a repeated name.
        entries = json.loads(text, object_pairs_hook=lambda pairs: tuple(pairs))
    except (ValueError, RecursionError) as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise DataError(f"captions file {file}, line {line}: {reason}: fix the JSON") from error
    if not isinstance(entries, tuple):
        raise DataError(f'captions file {file}: must be a single object {{"name.png": "caption", ...}}')
    yield from entries


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_jsonl(file: Path, text: str) -> Entries:
    for number, line in _numbered_lines(text):
        try:
            record = json.loads(line)
            name, caption = record["file"], record["caption"]
            if not isinstance(name, str):
                raise TypeError(name)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise DataError(
                f'captions file {file}, line {number}: must be {{"file": "name.png", "caption": "..."}}'
            ) from error
        yield name, caption


def _read_tsv(file: Path, text: str) -> Entries:
    for number, line in _numbered_lines(text):
        name, tab, caption = line.rstrip("\r").partition("\t")
        if not tab:
            raise DataError(f"captions file {file}, line {number}: no tab: write name<TAB>caption")
        yield name, caption
