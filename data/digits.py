"""The demo's data: scikit-learn's 1,797 real handwritten digits (8x8 grey), as captioned shards."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.config import DataSettings
from data.errors import DataError
from data.patterns import expand
from data.reader import ShardDataset
from data.writer import write_shards

WORDS = "zero one two three four five six seven eight nine".split()
PHRASINGS = (
    "a handwritten {}",
    "the digit {}, written by hand",
    "a photo of the number {}",
    "handwritten number {} on paper",
    "someone wrote the digit {}",
    "a small drawing of a {}",
)
TRAIN, HELDOUT = "train", "heldout"
PER_SHARD = 400


def caption(digit: int, phrasing: int) -> str:
    return PHRASINGS[phrasing].format(WORDS[digit])


def _samples(images: np.ndarray, digits: np.ndarray, rows: np.ndarray, seed: int) -> Iterator[dict]:
    for row in rows:
        phrasing = int(np.random.Generator(np.random.PCG64([seed, int(row)])).integers(len(PHRASINGS)))
        grey = np.round(images[row] * (255 / 16)).astype(np.uint8)  # scikit-learn counts 0..16
        file = io.BytesIO()
        Image.fromarray(grey).convert("RGB").save(file, format="png")
        yield {
            "__key__": f"digit-{row:06d}",
            "png": file.getvalue(),
            "txt": caption(int(digits[row]), phrasing),
            "json": {"class": int(digits[row]), "source": "scikit-learn digits", "row": int(row)},
        }


def build_digits(out: Path, seed: int = 0, heldout: float = 0.25) -> dict[str, int]:
    """Writes `train-*.tar` and `heldout-*.tar` (a stratified share) into `out`; returns the samples of each.

    Shards that are already there are left as they are. Raises DataError.
    """
    counts = {}
    for prefix in (TRAIN, HELDOUT):
        if any(out.glob(f"{prefix}-*.tar")):
            shards = expand(str(out / f"{prefix}-*.tar"), "shards")
            counts[prefix] = len(ShardDataset(shards, DataSettings(resolution=8), seed, images=True))
    if len(counts) == 2:
        return counts
    if counts:
        raise DataError(f"{out} holds only half of the digits ({', '.join(counts)}): remove its shards and build again")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'disback[demo]'"
        ) from error
    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, held = train_test_split(rows, test_size=heldout, stratify=digits.target, random_state=seed)
    for prefix, part in ((TRAIN, train), (HELDOUT, held)):
        write_shards(_samples(digits.images, digits.target, part, seed), out, prefix, PER_SHARD)
        counts[prefix] = len(part)
    return counts
