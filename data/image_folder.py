"""Shards from a folder of captioned images."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.captions import SEVERAL_CAPTIONS, Captions, Origins, clean_caption
from data.captions_file import read_captions
from data.errors import DataError
from data.processes import Progress, in_processes
from data.shard_index import load_index
from data.shard_writer import open_folder, shard_file, write_shard

EXTENSIONS = {f".{name}": name for name in ("png", "jpg", "webp", "gif", "bmp", "tif", "avif")}
EXTENSIONS |= {".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".tiff": "tif"}
PREFIX = "images"
CHUNK = 256  # images that a process checks at once


@dataclass(frozen=True)
class Sample:
    """An image of the folder. key: of its sample. name: its path below the folder. size: of the file, in bytes. caption: None
    if it is left out. entry: of the captions file that is used for it. reason: for which it is left out."""

    key: str
    name: str
    size: int = 0
    caption: str | None = None
    entry: str = ""
    reason: str = ""


def build_from_folder(
    images: Path,
    captions: Path | None,
    out: Path,
    per_shard: int = 1000,
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> dict:
    """Writes images-*.tar into `out` from all images below a folder and the folders linked there, with their bytes
    unchanged; shards of the same images and captions that are there already are kept, so that an interrupted build goes on.
    The bytes do not depend on the number of processes.

    An image's caption is its entry in the captions file by its path below the folder, or else the .txt next to it, or
    else the captions file's entry for its bare name, if no other image has that name. say: is told the progress. Returns
    {"samples": int, "shards": [paths], "kept": shards that were there, "rejects": {reason: images left out}, "ignored": {what:
    other files and entries that were not used}}. Raises DataError if no image is usable, the captions file is malformed, `out`
    holds shards of other images or captions, or cannot be written.
    """
    if not images.is_dir():
        raise DataError(f"image folder {images} does not exist: check --images")
    existing = open_folder(out, PREFIX)
    entries = read_captions(captions) if captions else {}
    ignored: Counter[str] = Counter()
    files, texts = _find(images, ignored)
    usable, unused, rejects = _check(images, files, texts, entries, processes, say)
    stems = {_stem(name) for name in files}
    ignored[".txt without an image"] += sum(stem not in stems for stem in texts)
    ignored["entry of the captions file without an image that needs it"] += unused
    ignored = +ignored
    if not usable:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejects.items()) or "it has no images"
        besides = ", ".join(f"{count} x {what}" for what, count in ignored.items())
        raise DataError(
            f"image folder {images}: none of its {len(files)} images is usable: {reasons}"
            f"{f' (not read: {besides})' if besides else ''}: "
            "put a .txt next to each image, or pass a captions file with --captions"
        )
    parts = [usable[first : first + per_shard] for first in range(0, len(usable), per_shard)]
    shards = {shard_file(out, PREFIX, number): part for number, part in enumerate(parts)}
    kept = [(shard, shards.get(shard, [])) for shard in existing]
    for (shard, _), same in zip(kept, in_processes(_holds, kept, processes), strict=True):
        if not same:
            raise DataError(
                f"{out} already holds {shard.name} with other images or captions than these: choose another folder, or "
                f"remove its {PREFIX}-*.tar"
            )
    done = set(existing)
    missing = [(shard, part) for shard, part in shards.items() if shard not in done]
    progress = Progress("writing shards", sum(len(part) for _, part in missing), say)
    for count in in_processes(partial(_write, images), missing, processes):
        progress.add(count)
    return {
        "samples": len(usable),
        "shards": list(shards),
        "kept": len(existing),
        "rejects": dict(rejects),
        "ignored": dict(ignored),
    }


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _find(root: Path, ignored: Counter) -> tuple[list[str], dict[str, str]]:
    """The images below a folder, and the .txt files by their name without extension: sorted paths below the folder.

    Links to folders are followed, except back into a folder that they are in. Hidden files (macOS writes a ._x.png to
    some file systems) and what has another extension are counted in `ignored`.
    """

    def fail(error: OSError) -> None:
        ignored[f"folder that cannot be read ({error.strerror})"] += 1

    images, texts = [], {}
    inside = {os.fspath(root): {os.path.realpath(root)}}  # by folder: the real folders that it is in
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        around, deeper = inside.pop(folder), []
        for name in folders:
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if name.startswith("."):
                ignored["hidden folder"] += 1
            elif real in around:
                ignored["link back into a folder that it is in"] += 1
            else:
                inside[path] = around | {real}
                deeper.append(name)
        folders[:] = deeper
        for name in files:
            path = Path(folder, name).relative_to(root).as_posix()
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                ignored["hidden file"] += 1
            elif suffix in EXTENSIONS:
                images.append(path)
            elif suffix == ".txt":
                if path.endswith(".txt") or _stem(path) not in texts:
                    texts[_stem(path)] = path
            else:
                ignored[f"{suffix or 'file without extension'}, no image"] += 1
    return sorted(images, key=lambda path: path.split("/")), texts


def _check(
    root: Path,
    files: list[str],
    texts: dict[str, str],
    entries: dict[str, list[object]],
    processes: int,
    say: Callable[[str], None],
) -> tuple[list[Sample], int, Counter]:
    """The usable images, the number of unused entries of the captions file, and the other images by reason."""
    table, usable, unused, rejects = Captions(entries, files), [], set(entries), Counter()
    rows = [(number, name, texts.get(_stem(name)), table.of(name)) for number, name in enumerate(files)]
    chunks = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
    progress = Progress("checking images", len(files), say)
    for samples in in_processes(partial(_samples, root), chunks, processes):
        for sample in samples:
            unused.discard(sample.entry)
            if sample.reason:
                rejects[sample.reason] += 1
            else:
                usable.append(sample)
        progress.add(len(samples))
    return usable, len(unused), rejects


def _samples(root: Path, rows: list[tuple[int, str, str | None, Origins]]) -> list[Sample]:
    return [_sample(root, *row) for row in rows]


def _sample(root: Path, number: int, name: str, text: str | None, origins: Origins) -> Sample:
    # Keys are numbers: a file name may contain dots, which end a key, or occur in two folders.
    file, key, entry = root / name, f"{number:09d}", ""
    try:
        if file.exists() and not file.is_file():
            raise ValueError("not a file")  # reading a pipe would wait for ever
        entry, captions = origins.first(root / text if text and (root / text).is_file() else None)
        if len(captions) > 1:
            raise ValueError(SEVERAL_CAPTIONS)
        caption = clean_caption(captions[0])
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if not opened.read(1):
                raise ValueError("empty image file")
    except ValueError as reason:
        return Sample(key, name, entry=entry, reason=str(reason))
    except OSError as error:
        return Sample(key, name, entry=entry, reason=f"cannot be read ({error.strerror})")
    return Sample(key, name, size, caption, entry)


def _extension(name: str) -> str:
    return EXTENSIONS[os.path.splitext(name)[1].lower()]


def _holds(job: tuple[Path, list[Sample]]) -> bool:
    """Whether a shard has exactly these samples, by keys, captions, names and sizes of the images."""
    shard, samples = job
    index = load_index(shard)
    if index.keys.tolist() != [sample.key.encode() for sample in samples]:
        return False
    columns = {extension: column for column, extension in enumerate(index.extensions)}
    if not {"txt", "json"} | {_extension(sample.name) for sample in samples} <= set(columns):
        return False
    with shard.open("rb") as tar:
        for row, sample in enumerate(samples):
            stored = {}
            for extension in ("txt", "json"):
                tar.seek(max(int(index.offset[row, columns[extension]]), 0))
                stored[extension] = tar.read(max(int(index.size[row, columns[extension]]), 0))
            size = int(index.size[row, columns[_extension(sample.name)]])
            texts = sample.caption.encode(), json.dumps({"file": sample.name}).encode()
            if (size, stored["txt"], stored["json"]) != (sample.size, *texts):
                return False
    return True


def _write(root: Path, job: tuple[Path, list[Sample]]) -> int:
    """Writes a shard; returns the number of its samples."""
    shard, samples = job
    write_shard((_read(root, sample) for sample in samples), shard)
    return len(samples)


def _read(root: Path, sample: Sample) -> dict:
    try:
        raw = (root / sample.name).read_bytes()
    except OSError as error:
        raise DataError(f"image {root / sample.name}: {error.strerror}: check it, and run the command again") from error
    if len(raw) != sample.size:
        raise DataError(
            f"image {root / sample.name} changed while shards were built: run the command again when it is complete"
        )
    return {
        "__key__": sample.key,
        _extension(sample.name): raw,
        "txt": sample.caption,
        "json": {"file": sample.name},
    }
