"""Reads the captions that images are generated for, from the formats in which evaluation prompts are published."""

import csv
import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.buckets import Size
from data.errors import DataError

KEYS = ("prompt", "caption", "text")  # columns and fields that captions are looked for in
NONE = "prompts without captions"


@dataclass(frozen=True)
class Prompt:
    """A caption. id: names its images. meta: what else the file says about it. size: height and width in pixels of its images,
    None for the run's."""

    text: str
    id: str
    meta: dict = field(default_factory=dict)
    size: Size | None = None

    @property
    def identity(self) -> list:
        """What its images are a function of, besides their noise."""
        return [self.text, self.meta, *([list(self.size)] if self.size else [])]


def read_prompts(file: Path, key: str = "") -> list[Prompt]:
    """The captions of a file, in its order; their ids are their numbers, "00000" and so on.

    .txt: one per line, without blank lines. .jsonl: a string or an object per line. .json: a list of such, an object
    {name: caption}, or COCO's captions (the first of each image, in the order of image ids). .csv, .tsv (without
    quoting), .parquet: a column. .pkl: a pickled list of strings, where None is an empty caption. A folder: a caption
    per .txt, sorted by name; the id is the name without its extension. Except in .txt, an empty caption is a caption.

    key: the field or column of the captions (default: prompt, caption or text, whichever comes first); other formats
    ignore it. Raises DataError naming the file, the line and the key if there is nothing else to read a caption from.
    """
    found = list(iterate_prompts(file, key))
    if not found:
        raise DataError(f"{NONE}: {file} has none: write captions into it, or name another file")
    return found


def iterate_prompts(file: Path, key: str = "") -> Iterator[Prompt]:
    """What `read_prompts` returns, one by one, for files whose prompts would not fit into memory as objects."""
    file = Path(file).expanduser()
    suffix = file.suffix.lower()
    try:
        file.stat()
    except OSError as error:
        raise DataError(f"prompts {file}: {error.strerror}: check the path") from error
    if file.is_dir():
        yield from _read_folder(file)
        return
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(
            f"prompts {file}: unknown format {suffix or '(no extension)'}: use {known}, or a folder of .txt"
        )
    for number, (caption, meta, where) in enumerate(READERS[suffix](file, key)):
        yield Prompt(_caption(caption, file, where), f"{number:05d}", meta)


# What readers yield: a caption, still to be checked, its meta, and where it stands, for messages.
Rows = Iterator[tuple[object, dict, str]]


def _read_folder(folder: Path) -> list[Prompt]:
    files = sorted(file for file in folder.glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise DataError(f"{NONE}: folder {folder} has no *.txt: put one file per caption into it, or name a file")
    found = [Prompt(_read_text(file).strip(), file.stem) for file in files]
    for file, prompt in zip(files, found, strict=True):
        if not prompt.text:
            raise DataError(f"prompts {file}: the caption is blank: write one into it, or remove the file")
    return found


def _read_txt(file: Path, key: str) -> Rows:
    for number, line in _lines(_read_text(file)):
        yield line.strip(), {}, f"line {number}"


def _read_jsonl(file: Path, key: str) -> Rows:
    for number, line in _lines(_read_text(file)):
        where = f"line {number}"
        yield _record(_parse(file, line, where), key, file, where)


def _read_json(file: Path, key: str) -> Rows:
    data = _parse(file, _read_text(file), "")
    if isinstance(data, list):
        for number, value in enumerate(data):
            yield _record(value, key, file, f"entry {number}")
    elif isinstance(data, dict) and isinstance(data.get("annotations"), list):
        yield from _coco(data, key or "caption", file)
    elif isinstance(data, dict):
        for name, caption in data.items():
            yield caption, {"name": name}, f"key {name!r}"
    else:
        raise DataError(f"prompts {file}: {_kind(data)}: write a list, {{name: caption}}, or COCO's annotations")


def _coco(data: dict, key: str, file: Path) -> Rows:
    """The first caption, by annotation id, of each image, by image id. Images without a caption are left out."""
    first: dict[int, dict] = {}
    for number, note in enumerate(data["annotations"]):
        if not (isinstance(note, dict) and type(note.get("image_id")) is int and type(note.get("id")) is int):
            raise DataError(
                f"prompts {file}, annotation {number}: no whole-numbered id and image_id: use COCO's captions"
            )
        best = first.setdefault(note["image_id"], note)
        if note["id"] < best["id"]:
            first[note["image_id"]] = note
    images = data.get("images")
    names = {
        image.get("id"): image.get("file_name")
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict) and type(image.get("id")) is int
    }
    for image, note in sorted(first.items()):
        caption, meta, where = _record(note, key, file, f"annotation id {note['id']}")
        yield caption, meta | ({"file_name": names[image]} if names.get(image) else {}), where


def _read_csv(file: Path, key: str) -> Rows:
    yield from _table(file, key, delimiter=",", strict=True)


def _read_tsv(file: Path, key: str) -> Rows:
    # PartiPrompts and others write tabs and line ends only: quotes belong to captions.
    yield from _table(file, key, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(file: Path, key: str, **dialect: object) -> Rows:
    rows = csv.reader(io.StringIO(_read_text(file), newline=""), **dialect)
    try:
        header = next(rows, [])
        column = header.index(_column(header, key, file))
        for row in rows:
            if len(row) not in (0, len(header)):
                raise DataError(
                    f"prompts {file}, line {rows.line_num}: {len(row)} fields, but {len(header)} columns: quote captions "
                    "that have commas or line ends (.csv)"
                )
            if row:
                yield row[column], dict(zip(header, row, strict=True)), f"line {rows.line_num}"
    except csv.Error as error:
        raise DataError(f"prompts {file}, line {rows.line_num}: {error}: fix the table") from error


def _read_parquet(file: Path, key: str) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise DataError(f"prompts {file}: reading .parquet needs pyarrow: pip install pyarrow") from error
    simple = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    try:
        with parquet.ParquetFile(file) as source:
            column = _column(source.schema_arrow.names, key, file)
            # The other columns may hold images: only what a .json could hold as it is becomes meta.
            kept = [part.name for part in source.schema_arrow if any(check(part.type) for check in simple)]
            rows = source.read(columns=list({column: None} | dict.fromkeys(kept))).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"prompts {file}: cannot be read as Parquet ({_one_line(error)}): copy it again") from error
    for number, row in enumerate(rows):
        yield row[column], {name: row[name] for name in kept}, f"row {number}, column {column!r}"


class _PlainUnpickler(pickle.Unpickler):
    """Reads nothing but plain data: it looks up no class and no function, so no pickle can run code."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_pickle(file: Path, key: str) -> Rows:
    raw = _read(file)
    try:
        data = _PlainUnpickler(io.BytesIO(raw), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(
            f"prompts {file}: is no pickled list of strings ({_one_line(error)}), and nothing else is unpickled: write the "
            "captions as .txt"
        ) from error
    if not isinstance(data, list):
        raise DataError(f"prompts {file}: {_kind(data)} where a list of strings should be: write the captions as .txt")
    for number, caption in enumerate(data):
        yield "" if caption is None else caption, {}, f"entry {number}"


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".pkl": _read_pickle,
}


def _record(value: object, key: str, file: Path, where: str) -> tuple[object, dict, str]:
    """A caption that is a string, or a field of an object, which is then its meta."""
    if not isinstance(value, dict):
        return value, {}, where
    name = _column(list(value), key, file, where)
    return value[name], value, f"{where}, key {name!r}"


def _column(names: list[str], key: str, file: Path, where: str = "header") -> str:
    """The name that is `key`, or else the first of KEYS that is there, in any case (PartiPrompts writes Prompt)."""
    if not key:
        lower = {name.lower(): name for name in reversed(names)}
        key = next((lower[usual] for usual in KEYS if usual in lower), "")
    if key in names:
        return key
    wanted = repr(key) if key else " or ".join(repr(usual) for usual in KEYS)
    known = ", ".join(names[:20]) or "nothing"
    raise DataError(f"{NONE}: {file}, {where}: no {wanted} among {known}: set the key of the captions")


def _caption(value: object, file: Path, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"prompts {file}, {where}: {_kind(value)} where a caption should be: write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"prompts {file}, {where}: half a surrogate pair at character {error.start}: fix it") from error
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _read(file: Path) -> bytes:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"prompts {file}: {error.strerror}: check the path") from error
    if not raw:
        raise DataError(f"prompts {file}: the file is empty: write captions into it, or remove it")
    return raw


def _read_text(file: Path) -> str:
    raw = _read(file).removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"prompts {file}, line {line}: not UTF-8 at byte {error.start}: save it as UTF-8") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank. str.splitlines would also split at characters that may occur in captions."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _parse(file: Path, text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = where or f"line {getattr(error, 'lineno', 1)}"
        reason = getattr(error, "msg", None) or _one_line(error)
        raise DataError(f"prompts {file}, {place}: {reason}: fix the JSON") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
