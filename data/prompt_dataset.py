"""Prompts alone as a training set: captions of a text file or table, without images."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data.buckets import Size
from data.captions import clean_caption
from data.errors import DataError
from data.prompts import iterate_prompts
from data.sampling_order import SampleOrder

NEEDS_IMAGES = {"image": "images", "latents": "latents of images"}


class PromptDataset(Dataset):
    """Captions by global position, in the order in which ShardDataset would read as many samples.

    What is no caption (an empty line of a table) is left out and counted in `rejected`, by reason. 8 bytes per caption are
    held beside its text. encoding: None, since nothing is encoded.
    """

    encoding = None

    def __init__(
        self,
        files: Sequence[Path],
        want: Collection[str],
        seed: int = 0,
        key: str = "",
        size: Size = (1024, 1024),
    ):
        """files: as for `read_prompts`. want: what the stage reads. key: the field or column of the captions (default: the
        usual ones). size: height and width of the images that are generated. Raises DataError if the stage needs images, a file is malformed, or no caption is left."""
        self.files = [Path(file) for file in files]
        names = ", ".join(str(file) for file in self.files)
        if needed := [text for what, text in NEEDS_IMAGES.items() if what in want]:
            raise DataError(
                f"data.train={names} holds prompts alone, but this stage needs {needed[0]} (pretraining does, and backtracking "
                "with gan.enabled=true): name shards of captioned images, or set gan.enabled=false"
            )
        self.rejected: Counter[str] = Counter()
        text, ends = bytearray(), [0]
        for file in self.files:
            for prompt in iterate_prompts(file, key):
                try:
                    text += clean_caption(prompt.text).encode()
                except ValueError as reason:
                    self.rejected[str(reason)] += 1
                else:
                    ends.append(len(text))
        if len(ends) == 1:
            raise DataError(f"data.train={names}: no usable caption ({dict(self.rejected)}): write captions into it")
        self._text, self._ends = np.frombuffer(bytes(text), np.uint8), np.array(ends)
        self.order = SampleOrder(len(self), seed)
        self.shapes, self.counts = (size,), [len(self)]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, row: int) -> dict:
        """A row's key (its number), caption and meta (nothing)."""
        caption = self._text[self._ends[row] : self._ends[row + 1]].tobytes().decode()
        return {"key": f"{row:05d}", "caption": caption, "meta": {}, "size": self.shapes[0]}

    def __getitem__(self, position: int) -> dict:
        return self.read(self.order.row(position)) | {"position": position, "skipped": {}}

    main_bucket = 0

    def example(self, number: int, bucket: int | None = None) -> dict:
        """dataset[number]; there is one bucket."""
        return self[number]

    def close(self) -> None:
        """There is nothing to close; as for shards."""
