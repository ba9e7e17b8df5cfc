"""Shards from a folder of captioned images."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.shard_writer import write_shards

EXTENSIONS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
PREFIX = "images"


def build_from_folder(images: Path, captions: Path | None, out: Path, per_shard: int = 1000) -> dict:
    """Writes images-*.tar into `out` from all images below a folder, with their bytes unchanged.

    An image's caption is its entry in the captions file, by path below the folder or by bare name, or else the .txt
    next to the image. Returns {"samples": int, "shards": [paths], "rejects": {reason: count}}. Raises DataError if no
    image is usable or the captions file is malformed, and as write_shards does.
    """
    if not images.is_dir():
        raise DataError(f"image folder {images} does not exist: check --images")
    by_name = read_captions(captions) if captions else {}
    files = sorted(file for file in images.rglob("*") if file.suffix.lower() in EXTENSIONS)
    rejects: Counter[str] = Counter()
    shards = write_shards(_samples(files, images, by_name, rejects), out, PREFIX, per_shard)
    if not shards:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejects.items())
        raise DataError(
            f"image folder {images}: none of its {len(files)} images is usable: {reasons or 'it has no images'}: "
            "put a .txt next to each image, or pass a captions file with --captions"
        )
    return {"samples": len(files) - rejects.total(), "shards": shards, "rejects": dict(rejects)}


def _samples(files: list[Path], root: Path, by_name: dict[str, str], rejects: Counter) -> Iterator[dict]:
    for number, file in enumerate(files):
        name = file.relative_to(root).as_posix()
        try:
            text = by_name.get(name, by_name.get(file.name))
            text_file = file.with_suffix(".txt")
            if text is None and text_file.is_file():
                text = text_file.read_text(encoding="utf-8")
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
            # Keys are numbers: a file name may contain dots, which end a key, or occur in two folders.
            extension = EXTENSIONS[file.suffix.lower()]
            yield {"__key__": f"{number:09d}", extension: raw, "txt": text.strip(), "json": {"file": name}}


def read_captions(file: Path) -> dict[str, str]:
    """Captions by image name, from .json ({name: caption}), .jsonl (one {"file", "caption"} per line) or .tsv (name,
    tab, caption per line). Raises DataError naming the line."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".tsv": _read_tsv}
    if file.suffix not in readers:
        raise DataError(
            f"captions file {file}: unknown format {file.suffix or '(no extension)'}: use {', '.join(readers)}"
        )
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
        raise DataError(f"captions file {file}, line {error.lineno}: {error.msg}: fix the JSON") from error
    if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
        raise DataError(f'captions file {file}: must be a single object {{"name.png": "caption", ...}}')
    return captions


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_jsonl(file: Path, text: str) -> dict[str, str]:
    captions = {}
    for number, line in _numbered_lines(text):
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
    for number, line in _numbered_lines(text):
        name, tab, caption = line.rstrip("\r").partition("\t")
        if not tab:
            raise DataError(f"captions file {file}, line {number}: no tab: write name<TAB>caption")
        captions[name] = caption
    return captions
