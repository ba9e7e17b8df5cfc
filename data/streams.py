"""Shards at URLs, streamed: webdataset resamples and shuffles them, and our own reader decodes their samples."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import IO

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import DataPipeline, ResampledShards, detshuffle

from data.buckets import Size
from data.caption_source import CaptionSource
from data.encoded import EXTENSION, RECORD_KEY, encoding_in
from data.errors import DataError
from data.gathered_shards import ENCODED_CAPTIONS, extensions_read
from data.loader import Batches, collate
from data.mixture import Mixture
from data.rejects import ENOUGH, RETRIED, reasons
from data.remote_files import CannotRead, open_url
from data.selection import Selection
from data.settings import DataSettings
from data.shard_dataset import SampleError, ShardDataset, check_size
from data.shard_index import DOTTED
from data.stream_tar import DamagedShard, hidden_samples, tar_samples

HEAD = 1024  # first samples that previews, probes and the autoencoder's scale are made of
DEAD_SHARDS = 20  # in a row without a sample: then the source is broken, not a shard
UNREADABLE = "shard that cannot be read"
OTHER_ENCODING = "encoded differently from the first sample"
SKIPPED = "__skipped__"  # in a raw sample: what was left out before it, by reason


class StreamDataset(ShardDataset):
    """Samples of shards at URLs, for training. They are decoded and refused as ShardDataset does it, but they have no
    positions: dataset[i] is one of the first HEAD samples, and StreamBatches reads the rest.

    sources: lists of URLs (or absolute paths), mixed by `weights`; without weights every shard is as likely.
    """

    def __init__(self, sources: Sequence[Sequence[str]], want: Collection[str], seed: int, data: DataSettings):
        """Raises DataError if no first sample can be read."""
        sources = [list(urls) for urls in sources]
        if not data.weights:
            sources = [[url for urls in sources for url in urls]]
        self.sources, self.weights, self.seed, self.data = sources, data.weights or [1.0], seed, data
        self.want, self.resolution = frozenset(want), data.resolution
        self.rejected: Counter[str] = Counter()
        self.encoding = first_encoding(sources, data)
        self.selection = Selection(random_crop=data.crop == "random", flip=data.flip)
        self.shapes, self.counts = (data.size,), [HEAD]
        configured = self._source = CaptionSource.of(data.caption_key, data.caption_field)
        if self.encoding:
            self._source = ENCODED_CAPTIONS
            self._several = configured if isinstance(data.caption_field, dict) else None
        self._places = extensions_read(self.want, data.image_keys, self._source)
        self._places = {what: [end.lower() for end in ends] for what, ends in self._places.items()}
        self._ends = tuple([end.lower() for end in ends] for ends in (data.image_keys, self._source.extensions))
        self._files, self._process, self._raw = {}, -1, {}
        self._first: list[dict] = []  # raw samples
        self._rest: Iterator[dict] | None = None

    def __len__(self) -> int:
        return HEAD

    def size(self, row: int) -> Size:
        return self.shapes[0]

    def locate(self, row: int) -> tuple[str, str]:
        return self._raw["__url__"], self._raw["__key__"]

    def _read(self, row: int, what: str) -> bytes:
        for end in self._places.get(what, ()):
            if raw := self._raw.get(end):
                check_size(what, len(raw))
                return raw
        return b""

    def decode(self, raw: dict, number: int) -> dict:
        """A raw sample as from `read`. number: what is drawn for it depends on. Raises SampleError."""
        self._raw = raw
        for what, ends in self._places.items():
            if what != "meta" and not any(map(raw.get, ends)):
                raise SampleError(f"no {what} (.{', .'.join(ends)})")
        sample = self.read(0, number)
        if self.encoding and encoding_in(sample["meta"].get(RECORD_KEY)) != self.encoding:
            raise SampleError(OTHER_ENCODING)
        return sample

    def __getitem__(self, position: int) -> dict:
        """The first samples of the sources' shards in their order, over and over if there are fewer than HEAD."""
        if self._rest is None:
            shards = ({"url": url} for urls in self.sources for url in urls)
            self._rest = self.usable(self.raw_samples(shards), self._first)
        place = position % HEAD
        while place >= len(self._first) and next(self._rest, None):
            pass
        return self.decode(self._first[place % len(self._first)], place) | {"position": position, "skipped": {}}

    def raw_samples(self, shards: Iterator[dict]) -> Iterator[dict]:
        """The undecoded samples of {"url": url}, with their counts under SKIPPED. Raises DataError after DEAD_SHARDS."""
        skipped: Counter[str] = Counter()
        keep, dead, reason = {end for ends in self._places.values() for end in ends}, 0, ""
        for shard in shards:
            found = False
            for sample in self._shard(shard["url"], keep, skipped):
                if isinstance(sample, str):
                    reason = sample
                    continue
                found, dead, names = True, 0, sample.pop("__names__")
                if hidden := hidden_samples(names, *self._ends):
                    skipped[DOTTED] += hidden
                    if names.isdisjoint([end for ends in self._ends for end in ends]):
                        continue  # no sample itself
                sample["__url__"] = shard["url"]
                if skipped:
                    sample[SKIPPED] = dict(skipped)
                    skipped.clear()
                yield sample
            dead += not found
            if dead >= DEAD_SHARDS:
                raise DataError(
                    f"data.train: {dead} shards in a row gave no sample, the last one {shard['url']} ({reason or 'empty'}): "
                    "check the address, the server and the credentials"
                )

    def _shard(self, url: str, keep: set[str], skipped: Counter[str]) -> Iterator[dict | str]:
        """The samples of a shard; then, if its rest is lost, the reason."""
        file = None
        try:
            with closing(open_url(url, self.data.retry_seconds)) as file:
                yield from tar_samples(file, skipped, keep)
        except DamagedShard as error:
            skipped[str(error)] += 1
            yield str(error)
        except OSError as error:  # CannotRead, and a pipe whose command failed
            skipped[UNREADABLE] += 1
            yield " ".join(str(error).split())[:300]
        finally:
            if interruptions := getattr(file, "interruptions", 0):
                skipped[RETRIED] += interruptions

    def usable(self, raws: Iterator[dict], kept: list[dict] | None = None, first: int = 0) -> Iterator[dict]:
        """The decoded samples, with "skipped". kept: raw ones are collected there. first: the number of the first sample.
        Raises DataError if the first ENOUGH are all unusable, or as many in a row later."""
        skipped: Counter[str] = Counter()
        lost = 0
        for number, raw in enumerate(raws, first):
            if SKIPPED in raw:
                skipped.update(raw.pop(SKIPPED))
            try:
                sample = self.decode(raw, number)
            except SampleError as reason:
                skipped[str(reason)] += 1
                lost += 1
                if lost >= ENOUGH:
                    raise DataError(
                        f"{lost} samples of data.train in a row are unusable ({reasons(skipped)}), the last one in shard "
                        f"{raw['__url__']}, key {raw['__key__']}: check data.image_keys, data.caption_key and data.caption_field"
                    ) from None
                continue
            if kept is not None:
                kept.append(raw)
            yield sample | {"position": -1, "skipped": dict(skipped)}
            if skipped:
                skipped.clear()
            lost = 0
        if kept is not None and not kept:
            raise DataError(f"data.train: no shard has a usable sample ({reasons(skipped)}): check the addresses")

    def endless(self, *place: int) -> Iterator[dict]:
        """The resampled and shuffled samples of a place: rank, loader process, first step."""
        streams = []
        for source, urls in enumerate(self.sources):
            seed = _seed(self.seed, source, *place)
            shards = ResampledShards(urls, seed=seed, deterministic=True, worker_seed=int)  # int() is 0
            buffer = max(self.data.shuffle_buffer, 1)
            usable = partial(self.usable, first=seed << 30)  # each place draws its own crops, flips and captions
            stages = shards, self.raw_samples, detshuffle(buffer, max(buffer // 10, 1), seed=seed), usable
            streams.append(iter(DataPipeline(*stages)))
        mixture = Mixture(self.weights, _seed(self.seed, *place))
        position = 0
        while True:
            yield next(streams[mixture.locate(position)[0]])
            position += 1


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(numbers).encode()).digest()[:4])


@contextmanager
def _unread(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A file that need not be read to its end: a command whose pipe is closed early fails, which says nothing."""
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


def first_encoding(sources: Sequence[Sequence[str]], data: DataSettings) -> dict | None:
    """How the first sample that can be read is encoded; None for plain images. Raises DataError if none can be read."""
    reason = "no samples"
    for url in [url for urls in sources for url in urls][:DEAD_SHARDS]:
        try:
            with _unread(open_url(url, data.retry_seconds)) as file:
                for sample in tar_samples(file, Counter()):
                    if EXTENSION not in sample or "json" not in sample:
                        return None
                    meta = json.loads(sample["json"])
                    return encoding_in(meta.get(RECORD_KEY)) if isinstance(meta, dict) else None
        except (DamagedShard, CannotRead, ValueError, RecursionError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
    raise DataError(
        f"data.train: no sample can be read ({reason}): check the addresses, the server and the credentials"
    )


class _RankStream(IterableDataset):
    """Collated micro-batches of one rank, endless; each loader process has a stream of its own."""

    def __init__(self, dataset: StreamDataset, micro_batch: int, rank: int, start_step: int):
        self._dataset, self._micro, self._place = dataset, micro_batch, (rank, start_step)

    def __iter__(self) -> Iterator[dict | DataError]:
        info = get_worker_info()
        samples = self._dataset.endless(info.id if info else 0, *self._place)
        try:
            while True:
                yield collate([next(samples) for _ in range(self._micro)])
        except DataError as error:  # raised here, it would reach the user in this process's traceback
            yield error


def _as_it_is(batch: dict | DataError) -> dict | DataError:
    return batch


class StreamBatches(Batches):
    """`Batches` of a StreamDataset. The step that it starts at seeds it: a run that resumes there goes on with other samples
    than the one that was not stopped, but always with the same ones. Steps that are not read use up no samples."""

    def _loader(self, dataset: StreamDataset, reading: dict) -> DataLoader:
        samples = _RankStream(dataset, self._split.micro_batch, self._rank, self._step)
        return DataLoader(samples, batch_size=None, collate_fn=_as_it_is, **reading)
