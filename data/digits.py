"""The demo's data set: scikit-learn's 1,797 real handwritten digits (8x8 grey), as captioned shards."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import DataError
from data.shard_writer import ensure_shards

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a handwritten {}",
    "the digit {}, written by hand",
    "a photo of the number {}",
    "handwritten number {} on paper",
    "someone wrote the digit {}",
    "a small drawing of a {}",
)
TRAIN, HELDOUT = "train", "heldout"
PER_SHARD = 400  # small, so that the demo has several shards as a large data set does


def caption(digit: int, phrasing: int) -> str:
    """The caption of a digit (0..9) in one of PHRASINGS."""
    return PHRASINGS[phrasing].format(WORDS[digit])


def build_digits(out: Path, seed: int = 0, heldout: float = 0.25) -> dict[str, int]:
    """Writes train-*.tar and heldout-*.tar (a stratified share) into `out`; returns the number of samples of each.

    Existing shards are kept, and an interrupted build is completed. Raises DataError if scikit-learn is missing, or if
    `out` has other shards with these names.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits are part of scikit-learn: pip install 'disback[demo]'") from error
    images, classes = load_digits(return_X_y=True)
    rows = np.arange(len(classes))
    split = train_test_split(rows, test_size=heldout, stratify=classes, random_state=seed)
    parts = dict(zip((TRAIN, HELDOUT), split, strict=True))
    for prefix, part in parts.items():
        samples = _samples(images[part].reshape(-1, 8, 8), classes[part], part, seed)
        ensure_shards([_key(row) for row in part], samples, out, prefix, PER_SHARD)
    return {prefix: len(part) for prefix, part in parts.items()}


def _key(row: int) -> str:
    return f"digit-{row:04d}"


def _samples(images: np.ndarray, classes: np.ndarray, rows: np.ndarray, seed: int) -> Iterator[dict]:
    for image, digit, row in zip(images, classes.tolist(), rows.tolist(), strict=True):
        phrasing = int(np.random.default_rng([seed, row]).integers(len(PHRASINGS)))
        grey = np.round(image * (255 / 16)).astype(np.uint8)  # scikit-learn's grey levels are 0 to 16
        file = io.BytesIO()
        Image.fromarray(grey).convert("RGB").save(file, format="png")
        yield {
            "__key__": _key(row),
            "png": file.getvalue(),
            "txt": caption(digit, phrasing),
            "json": {"class": digit, "source": "sklearn digits", "index": row},
        }
