"""Captions files: the captions of a folder's images by their names."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from data.errors import DataError

FILE_COLUMNS = ("file", "path", "image", "file_name", "filename")  # looked for in this order, in any case
CAPTION_COLUMNS = ("caption", "text", "prompt")

Entries = Iterator[tuple[str, object]]


def read_captions(file: Path) -> dict[str, list[object]]:
    """The distinct captions of each name, as they are written.

    .json: {name: caption}. .jsonl: an object per line. .csv, .parquet: a table. .tsv: name, tab, caption per line, or a table
    (without quoting). Fields and columns are the first of FILE_COLUMNS and of CAPTION_COLUMNS. Raises DataError naming the line.
    """
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"captions file {file}: unknown format {suffix or '(no extension)'}: use {', '.join(READERS)}")
    entries: dict[str, list[object]] = {}
    try:
        for name, caption in READERS[suffix](file):
            known = entries.setdefault(PurePosixPath(name).as_posix(), [])  # without a leading ./
            if caption not in known:
                known.append(caption)
    except OSError as error:
        raise DataError(f"captions file {file}: {error.strerror or error}: check --captions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"captions file {file}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    return entries


def _read_json(file: Path) -> Entries:
    try:
        # An object as a tuple of its pairs, not as a dict, which keeps only the last caption of a repeated name.
        entries = json.loads(_text(file), object_pairs_hook=lambda pairs: tuple(pairs))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise DataError(f"captions file {file}, line {line}: {reason}: fix the JSON") from error
    if not isinstance(entries, tuple):
        raise DataError(f'captions file {file}: must be a single object {{"name.png": "caption", ...}}')
    yield from entries


def _read_jsonl(file: Path) -> Entries:
    for number, line in _numbered_lines(_text(file)):
        where = f"captions file {file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {getattr(error, 'msg', error)}: fix the JSON") from error
        if not isinstance(record, dict):
            raise DataError(f'{where}: must be {{"file": "name.png", "caption": "..."}}')
        name, caption = (record[column] for column in _columns(list(record), where))
        if not isinstance(name, str):
            raise DataError(f"{where}: the name of the image must be text")
        yield name, caption


def _read_csv(file: Path) -> Entries:
    yield from _table(file, csv.reader(io.StringIO(_text(file), newline=""), strict=True))


def _read_tsv(file: Path) -> Entries:
    text = _text(file)
    first = text.partition("\n")[0].rstrip("\r").split("\t")
    if None not in _found(first):
        yield from _table(file, csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
        return
    for number, line in _numbered_lines(text):
        name, tab, caption = line.rstrip("\r").partition("\t")
        if not tab:
            raise DataError(f"captions file {file}, line {number}: no tab: write name<TAB>caption")
        yield name, caption


def _table(file: Path, rows: Iterator[list[str]]) -> Entries:
    try:
        header = next(rows, [])
        places = [header.index(column) for column in _columns(header, f"captions file {file}, header")]
        for row in rows:
            if len(row) not in (0, len(header)):
                raise DataError(
                    f"captions file {file}, line {rows.line_num}: {len(row)} fields, but {len(header)} columns: quote "
                    "captions that have commas or line ends (.csv)"
                )
            if row:
                yield row[places[0]], row[places[1]]
    except csv.Error as error:
        raise DataError(f"captions file {file}, line {rows.line_num}: {error}: fix the table") from error


def _read_parquet(file: Path) -> Entries:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise DataError(f"captions file {file}: reading .parquet needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(file) as source:
            texts = [
                field.name
                for field in source.schema_arrow  # an "image" may be the image itself
                if types.is_string(field.type) or types.is_large_string(field.type)
            ]
            columns = _columns(texts, f"captions file {file}, columns of text")
            row = 0
            for batch in source.iter_batches(columns=list(columns)):
                for name, caption in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                    if name is None:
                        raise DataError(f"captions file {file}, row {row}: no name of an image in column {columns[0]}")
                    row += 1
                    yield name, caption
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"captions file {file}: cannot be read as Parquet ({reason}): copy it again") from error


READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _found(names: Sequence[str]) -> list[str | None]:
    """Which of these columns or fields have the image's name, and its caption."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    return [
        next((lower[usual] for usual in wanted if usual in lower), None) for wanted in (FILE_COLUMNS, CAPTION_COLUMNS)
    ]


def _columns(names: Sequence[str], where: str) -> tuple[str, str]:
    file, caption = _found(names)
    if file is None or caption is None:
        wanted = " and ".join(
            f"one of {', '.join(usual)}"
            for usual, found in ((FILE_COLUMNS, file), (CAPTION_COLUMNS, caption))
            if found is None
        )
        known = ", ".join(names[:20]) or "nothing"
        raise DataError(f"{where}: looked for {wanted} among {known}: rename the columns")
    return file, caption


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
