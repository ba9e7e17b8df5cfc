"""Shards from a folder of images and their captions."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.shard_writer import write_shards

EXTENSIONS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
PREFIX = "images"


def build_folder(images: Path, captions: Path | None, out: Path, per_shard: int = 1000) -> dict:
    """Writes images-*.tar into `out` from every image below a folder, its bytes unchanged.

    A caption is the entry of the captions file under the image's path below the folder or its bare name, else the .txt
    beside the image. Returns {"samples": int, "shards": [paths], "rejects": {reason: count}}. Raises DataError if no
    image can be used, if the captions file is not understood, or as write_shards does.
    """
    if not images.is_dir():
        raise DataError(f"image folder {images} does not exist: check --images")
    known = read_captions(captions) if captions else {}
    files = sorted(file for file in images.rglob("*") if file.suffix.lower() in EXTENSIONS)
    rejects: Counter[str] = Counter()
    shards = write_shards(_samples(files, images, known, rejects), out, PREFIX, per_shard)
    if not shards:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejects.items())
        raise DataError(
            f"image folder {images}: none of its {len(files)} images can be used: {reasons or 'no images there'}: "
            "put a .txt beside each image or name a captions file with --captions"
        )
    return {"samples": len(files) - rejects.total(), "shards": shards, "rejects": dict(rejects)}


def _samples(files: list[Path], root: Path, known: dict[str, str], rejects: Counter) -> Iterator[dict]:
    for number, file in enumerate(files):
        name = file.relative_to(root).as_posix()
        try:
            text = known.get(name, known.get(file.name))
            beside = file.with_suffix(".txt")
            if text is None and beside.is_file():
                text = beside.read_text(encoding="utf-8")
            raw = file.read_bytes()
        except UnicodeDecodeError:
            rejects["caption is not UTF-8"] += 1
            continue
        except OSError as error:
            rejects[f"cannot be read ({error.strerror})"] += 1
            continue
        if not text or not text.strip():
            rejects["no caption"] += 1
        elif not raw:
            rejects["empty image file"] += 1
        else:
            # Numbered keys: a file's own name may hold dots, which end a key, or be there in two folders.
            extension = EXTENSIONS[file.suffix.lower()]
            yield {"__key__": f"{number:09d}", extension: raw, "txt": text.strip(), "json": {"file": name}}


def read_captions(file: Path) -> dict[str, str]:
    """Captions by image name from .json ({name: caption}), .jsonl ({"file", "caption"} a line) or .tsv (name, tab,
    caption a line). Raises DataError naming the line."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".tsv": _read_tsv}
    if file.suffix not in readers:
        raise DataError(f"captions file {file}: {file.suffix or 'no extension'} is unknown: use {', '.join(readers)}")
    try:
        return readers[file.suffix](file, file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"captions file {file}: {error.strerror}: check --captions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"captions file {file}: not UTF-8 at byte {error.start}: save it as UTF-8") from error


def _read_json(file: Path, text: str) -> dict[str, str]:
    try:
        captions = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"captions file {file}, line {error.lineno}: {error.msg}: correct the JSON") from error
    if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
        raise DataError(f'captions file {file}: must be one object {{"name.png": "caption", ...}}')
    return captions


def _read_jsonl(file: Path, text: str) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            captions[record["file"]] = str(record["caption"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'captions file {file}, line {number}: must be {{"file": "name.png", "caption": "..."}}'
            ) from error
    return captions


def _read_tsv(file: Path, text: str) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, tab, caption = line.rstrip("\r").partition("\t")
        if not tab:
            raise DataError(f"captions file {file}, line {number}: has no tab: write name<TAB>caption")
        captions[name] = caption
    return captions
