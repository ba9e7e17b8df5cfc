"""Shards from a folder of captioned images."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.captions import Captions, read_captions
from data.errors import DataError
from data.shard_writer import write_shards

EXTENSIONS = {f".{name}": name for name in ("png", "jpg", "webp", "gif", "bmp", "tif", "avif")}
EXTENSIONS |= {".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".tiff": "tif"}
PREFIX = "images"


def build_from_folder(images: Path, captions: Path | None, out: Path, per_shard: int = 1000) -> dict:
    """Writes images-*.tar into `out` from all images below a folder and the folders linked there, with their bytes
    unchanged.

    An image's caption is its entry in the captions file by its path below the folder, or else the .txt next to it, or
    else the captions file's entry for its bare name, if no other image has that name. Returns {"samples": int, "shards":
    [paths], "rejects": {reason: images left out}, "ignored": {what: other files and entries that were not used}}. Raises
    DataError if no image is usable or the captions file is malformed, and as write_shards does.
    """
    if not images.is_dir():
        raise DataError(f"image folder {images} does not exist: check --images")
    entries = read_captions(captions) if captions else {}
    ignored: Counter[str] = Counter()
    files, texts = _find(images, ignored)
    table = Captions(entries, files)
    rejects: Counter[str] = Counter()
    shards = write_shards(_samples(images, files, texts, table, rejects), out, PREFIX, per_shard)
    stems = {_stem(name) for name in files}
    ignored[".txt without an image"] += sum(stem not in stems for stem in texts)
    ignored["entry of the captions file without an image that needs it"] += len(table.unused)
    ignored = +ignored
    if not shards:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejects.items()) or "it has no images"
        besides = ", ".join(f"{count} x {what}" for what, count in ignored.items())
        raise DataError(
            f"image folder {images}: none of its {len(files)} images is usable: {reasons}"
            f"{f' (not read: {besides})' if besides else ''}: "
            "put a .txt next to each image, or pass a captions file with --captions"
        )
    return {
        "samples": len(files) - rejects.total(),
        "shards": shards,
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


def _samples(
    root: Path, files: list[str], texts: dict[str, str], captions: Captions, rejects: Counter
) -> Iterator[dict]:
    for number, name in enumerate(files):
        file, text = root / name, texts.get(_stem(name))
        try:
            if file.exists() and not file.is_file():
                raise ValueError("not a file")  # reading a pipe would wait for ever
            caption = captions.of(name, root / text if text and (root / text).is_file() else None)
            raw = file.read_bytes()
        except ValueError as reason:
            rejects[str(reason)] += 1
            continue
        except OSError as error:
            rejects[f"cannot be read ({error.strerror})"] += 1
            continue
        if not raw:
            rejects["empty image file"] += 1
        else:
            # Keys are numbers: a file name may contain dots, which end a key, or occur in two folders.
            yield {
                "__key__": f"{number:09d}",
                EXTENSIONS[os.path.splitext(name)[1].lower()]: raw,
                "txt": caption,
                "json": {"file": name},
            }
