"""Shards from a folder of images and their captions."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.writer import write_shards

IMAGES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


def read_captions(file: Path) -> dict[str, str]:
    """Captions by image name from .json ({name: caption}), .jsonl ({"file", "caption"} a line) or .tsv (name, tab,
    caption). Raises DataError naming the line."""
    captions = {}
    line = 0
    try:
        if file.suffix == ".json":
            return {str(k): str(v) for k, v in json.loads(file.read_text()).items()}
        with file.open(newline="") as handle:
            rows = csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE) if file.suffix == ".tsv" else handle
            for line, row in enumerate(rows, 1):
                if file.suffix == ".jsonl":
                    record = json.loads(row)
                    row = [record["file"], record["caption"]]
                if row:
                    name, captions[name] = row[0], row[1]
    except OSError as error:
        raise DataError(f"captions {file}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise DataError(
            f"captions {file}, line {line}: not understood ({error!r}); known forms: .json {{name: caption}}, "
            '.jsonl {"file", "caption"} a line, .tsv name<TAB>caption'
        ) from error
    return captions


def build_folder(images: Path, captions: Path | None, out: Path, per_shard: int = 10_000) -> tuple[int, Counter]:
    """Writes `images-*.tar` from every image below a folder, its bytes unchanged. A caption is the entry of the captions
    file under the image's path or name, else the text file beside it.

    Returns the samples written and the images left out by reason. Raises DataError if none is left.
    """
    if not images.is_dir():
        raise DataError(f"--images {images}: no such folder")
    known = read_captions(captions) if captions else {}
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGES)
    rejected: Counter[str] = Counter()
    written = 0

    def samples() -> Iterator[dict]:
        nonlocal written
        for number, file in enumerate(files):
            name = file.relative_to(images).as_posix()
            text = known.get(name, known.get(file.name))
            beside = file.with_suffix(".txt")
            if text is None and beside.is_file():
                text = beside.read_text(errors="replace")
            if not text or not text.strip():
                rejected["no caption"] += 1
                continue
            written += 1
            record = {"file": name}
            yield {
                "__key__": f"{number:09d}",
                IMAGES[file.suffix.lower()]: file.read_bytes(),
                "txt": text.strip(),
                "json": record,
            }

    write_shards(samples(), out, "images", per_shard)
    if not written:
        reasons = ", ".join(f"{n} x {r}" for r, n in rejected.items()) or "no .png, .jpg or .webp there"
        raise DataError(f"--images {images}: none of its {len(files)} images can be used: {reasons}")
    return written, rejected
