"""What a caption is, and which one is an image's."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


Entry = tuple[str, list[object]]  # of a captions file: a name and its distinct captions


@dataclass(frozen=True)
class Origins:
    """Where an image's caption may come from: its entry by path (`own`), the .txt next to it, its entry by bare name.
    otherwise: the reason for which it has none."""

    own: Entry | None
    bare: Entry | None
    otherwise: str

    def first(self, beside: Path | None) -> Entry:
        """The first that there is; the .txt (`beside`) has the name "". Raises ValueError with the reason if there is none,
        OSError if the .txt cannot be read."""
        if self.own:
            return self.own
        if beside:
            return "", [beside.read_bytes()]
        if self.bare:
            return self.bare
        raise ValueError(self.otherwise)


class Captions:
    """The captions of a folder's images, from the entries of a captions file and the .txt next to the images.

    An entry belongs to the image with its path below the folder, or else, if it is a bare name, to the only image of that
    name in any folder. Names match as they are, or else in Unicode's composed form: macOS writes decomposed names.
    """

    def __init__(self, entries: dict[str, list[object]], images: Sequence[str]):
        """entries: as from read_captions. images: their paths below the folder, with slashes."""
        self._entries = entries
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

    def of(self, image: str) -> "Origins":
        """Where an image's caption may come from."""
        own, bare = (self._entry(found.get(image)) for found in (self._by_path, self._by_name))
        return Origins(own, bare, SHARED_NAME if image in self._shared else "no caption")

    def _entry(self, name: str | None) -> "Entry | None":
        return None if name is None else (name, self._entries[name])


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _grouped(images: Sequence[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for image in images:
        groups.setdefault(key(image), []).append(image)
    return groups
