"""Clean copies of shards: what is usable of them, with its bytes unchanged."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from data.errors import DataError
from data.processes import in_processes
from data.rejects import reasons
from data.settings import DataSettings
from data.shard_dataset import SampleError, ShardDataset
from data.shard_index import load_index
from data.shard_writer import write_shard
from data.stream_tar import DamagedShard, tar_samples
from data.streams import StreamDataset

WANT = ("image", "caption", "meta")
SAME_KEY = "key that another sample has"


def repair(paths: Sequence[Path], out: Path, settings: DataSettings, processes: int = 1) -> dict[Path, tuple[int, str]]:
    """Writes `out`/NAME.tar with the usable samples of each shard; every image is decoded. Copies that are there already are
    kept, so that an interrupted repair goes on. Of a broken shard the samples before and after the damage are kept as far as
    they are complete.

    Returns the number of samples that each shard's copy has, and what was left out. Raises DataError if two shards have one
    name, or if a copy would replace its original.
    """
    names = Counter(path.name for path in paths)
    if twice := [name for name, count in names.items() if count > 1]:
        raise DataError(f"two shards are named {twice[0]}: repair each folder into one of its own")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write into {out}: {error.strerror}: choose another folder") from error
    if inside := next((path for path in paths if path.parent.resolve() == out.resolve()), None):
        raise DataError(f"{inside} lies in {out}: copies are never written in place: choose another folder")
    return dict(zip(paths, in_processes(partial(_repair, out=out, settings=settings), paths, processes), strict=True))


def _repair(path: Path, out: Path, settings: DataSettings) -> tuple[int, str]:
    final, left_out = out / path.name, Counter()
    if final.exists():
        return len(load_index(final)), "copied before"
    try:
        samples = _indexed(path, settings, left_out)
    except DataError as error:
        if not path.is_file():
            raise
        samples = _from_start(path, settings, left_out)
        left_out[f"broken shard ({error})"] += 1
    first = next(samples, None)
    if first is None:
        return 0, reasons(left_out)
    written = _Count()
    write_shard(written.of(first, samples), final)
    return written.count, reasons(left_out)


class _Count:
    """Counts samples on their way."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, first: dict, rest: Iterator[dict]) -> Iterator[dict]:
        self.count = 1
        yield first
        for sample in rest:
            self.count += 1
            yield sample


def _indexed(path: Path, settings: DataSettings, left_out: Counter) -> Iterator[dict]:
    """The usable samples of an intact shard. Raises DataError, before the first of them, if it is not intact."""
    index = load_index(path)
    dataset = ShardDataset([path], settings.resolution, WANT, 0, **settings.keys)
    left_out.update(dataset.rejected)
    return _members(path, index, dataset, left_out)


def _members(path: Path, index, dataset: ShardDataset, left_out: Counter) -> Iterator[dict]:
    rows = {key: row for row, key in enumerate(index.keys.tolist())}
    with path.open("rb") as tar:
        for number in range(len(dataset)):
            try:
                dataset.read(number)
            except SampleError as reason:
                left_out[str(reason)] += 1
                continue
            key = dataset.locate(number)[1]
            row, sample = rows[key.encode("utf-8", "replace")], {"__key__": key}
            for column, extension in enumerate(index.extensions):
                if index.offset[row, column] >= 0:
                    tar.seek(int(index.offset[row, column]))
                    sample[extension] = tar.read(int(index.size[row, column]))
            yield sample
    dataset.close()


def _from_start(path: Path, settings: DataSettings, left_out: Counter) -> Iterator[dict]:
    """The usable samples of a broken shard that are complete."""
    try:
        decoder = StreamDataset([[str(path.absolute())]], WANT, 0, settings)
    except DataError:
        return  # not a single sample
    keys = set()
    try:
        with path.open("rb") as tar:
            for raw in tar_samples(tar, left_out):
                key, sample = raw["__key__"], {end: value for end, value in raw.items() if end != "__names__"}
                try:
                    decoder.decode(raw | {"__url__": str(path)}, 0)
                except SampleError as reason:
                    left_out[str(reason)] += 1
                    continue
                if key in keys:
                    left_out[SAME_KEY] += 1
                    continue
                keys.add(key)
                yield sample
    except DamagedShard as error:
        left_out[str(error)] += 1
