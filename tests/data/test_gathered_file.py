"""Many shards opened from one file: exactly what their own indexes and facts give, and never once a shard has changed."""

import json
import os
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from data.errors import DataError
from data.gathered_file import PREFIX
from data.gathered_shards import Gathered
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_index import index_file
from trainer.training.shard_files import prepare_shards

N, PER_SHARD = 60, 2
SETTINGS = [
    (("image", "caption", "meta"), {}),
    (("caption",), {}),
    (("image",), {"image_keys": ["jpg", "png"]}),
    (("caption",), {"caption_field": {"blip": 2.0, "txt": 1.0}}),
    (("image", "caption"), {"filters": ["score >= 3", "caption_length > 2"]}),
    (("image", "caption"), {"filters": ["score >= 3.5", 'kind == "a b"'], "min_size": 8}),
    (("image", "meta"), {"resolution": 8, "buckets": [[8, 8], [8, 16], [16, 8]]}),
    (("image", "meta"), {"resolution": 8, "buckets": [[8, 16], [8, 8], [16, 8]], "filters": ["nsfw == false"]}),
]


@pytest.fixture
def many(shards, encode, pack, monkeypatch):
    """31 shards of at most two samples each, of sizes, keys and faults drawn at random; the file is for more than 4."""
    monkeypatch.setattr("data.gathered_file.MANY", 4)
    rng, samples = random.Random(0), {}
    for i in range(N):
        meta = {"row": i, "score": rng.randrange(10), "kind": rng.choice(["a b", "c"]), "nsfw": rng.random() < 0.3}
        meta |= {"blip": "b" * rng.randrange(1, 5)} if rng.random() < 0.7 else {}
        size = rng.choice([(8, 8), (16, 8), (8, 16), (9, 7)])
        samples[i] = {"png": encode((i, 0, 0), size=size), "json": json.dumps(meta).encode()}
        samples[i] |= rng.choice([{}, {}, {"png": None}, {"txt": None}]) if i % PER_SHARD else {}
    tars = shards(N, PER_SHARD, samples)
    empty = pack(tars[0].with_name("empty.tar"), [])
    long = [(f"a-long-key-of-its-own.{end}", raw) for end, raw in samples[0].items()]
    pack(tars[3], [*long, ("a-long-key-of-its-own.txt", b"long")])
    return [*tars[:9], empty, *tars[9:]]


def opened(tars, want=("image", "caption", "meta"), **data):
    return ShardDataset(tars, 8, want, seed=3, **DataSettings(**data).keys, batch=4)


def told(tars, want, data):
    """All that is known of a data set without its samples, and some of these."""
    dataset = opened(tars, want, **data)
    first = [
        {k: v for k, v in dataset[p].items() if k in ("key", "caption", "meta", "size", "skipped")} for p in range(9)
    ]
    rows = [(dataset.locate(row), dataset.size(row), dataset.read_member(row, "meta")) for row in range(len(dataset))]
    order = [next(dataset.order.candidates(position)) for position in range(2 * len(dataset))]
    return rows, order, list(dataset.rejected.items()), dataset.counts, dataset.paths, dataset.encoding, first


def files(tars):
    return sorted(tars[0].parent.glob(f"{PREFIX}*"))


@pytest.fixture
def reads(monkeypatch):
    """The number of times that shards were gathered from their indexes."""
    count, real = [], Gathered.of
    monkeypatch.setattr(Gathered, "of", lambda *args: count.append(1) or real(*args))
    return count


def test_the_file_gives_what_the_indexes_give(many, monkeypatch, reads):
    for want, data in SETTINGS:
        with monkeypatch.context() as patch:
            patch.setattr("data.gathered_file.MANY", 1000)
            plain = told(many, want, data)
        assert told(many, want, data) == plain  # written
        del reads[:]
        assert told(many, want, data) == plain and told(many[::-1], want, data) != plain
        assert len(reads) == 1  # of the reverse order
    assert len(files(many)) == 2 * len(SETTINGS) and {file.suffix for file in files(many)} == {".npz"}


def test_what_leaves_the_rows_as_they_are_shares_the_file(many, reads):
    opened(many)
    for keys in ({"resolution": 4}, {"seed": 5}, {"batch": 2}):
        ShardDataset(many, **{"resolution": 8} | keys)
    assert len(reads) == 1
    for file in many:  # the indexes are not even looked at
        index_file(file).unlink()
    opened([os.path.relpath(path) for path in many])
    assert len(reads) == 1 and not any(index_file(file).exists() for file in many)


@pytest.mark.parametrize("change", ["time", "content", "deleted"])
def test_a_changed_shard_is_read_again(many, pack, reads, change):
    before = len(opened(many))
    if change == "time":
        os.utime(many[5], (1, 1))
    elif change == "content":
        before -= len(opened([many[5]]))
        pack(many[5], [])
    else:
        many[5].unlink()
        with pytest.raises(DataError, match="s-000010.tar: No such file"):
            opened(many)
        return
    del reads[:]
    assert len(opened(many)) == before and len(opened(many)) == before and len(reads) == 1


def test_a_damaged_file_is_replaced(many, reads):
    want, data = SETTINGS[0]
    plain = told(many, want, data)
    (file,) = files(many)
    good, rng = file.read_bytes(), random.Random(0)
    damages = [b"", b"x", good[: len(good) // 2], good[:-1], np.array(["x"]).tobytes()]
    for _ in range(40):
        place = rng.randrange(len(good))
        damages.append(good[:place] + bytes([good[place] ^ (1 << rng.randrange(8))]) + good[place + 1 :])
    for damage in damages:
        file.write_bytes(damage)
        assert told(many, want, data) == plain
    del reads[:]
    assert told(many, want, data) == plain and not reads


def test_errors_are_those_of_the_indexes(many, pack, encode, reads):
    for _ in range(2):
        with pytest.raises(DataError, match=rf"no sample of {many[0].parent} is left \(.*not score >= 11"):
            opened(many, filters=["score >= 11"])
    assert len(reads) == 1  # that no sample is left is known from the file, too
    record = json.dumps({"cache": {"resolution": 8, "vae": "x", "text": None, "precision": "bf16"}}).encode()
    pack(many[-1], [("a.safetensors", b"x"), ("a.txt", b"x"), ("a.json", record), ("a.png", encode())])
    for _ in range(2):
        with pytest.raises(DataError, match=f"mixes different kinds of shards: {many[-1]} is encoded and {many[0]} is"):
            opened(many)
    for tar in many:
        pack(tar, [])
    for _ in range(2):
        with pytest.raises(DataError, match=f"none of the 31 shards has a sample .the first is {many[0]}"):
            opened(many)


def test_encoded_shards(many, pack):
    def encoded(n, path):
        record = {
            "resolution": 8,
            "vae": "x",
            "text": None,
            "precision": "bf16",
            "original_size": [8, 8],
            "crop": [0, 0],
        }
        members = {"safetensors": b"x", "txt": b"c%d" % n, "json": json.dumps({"cache": record}).encode()}
        return pack(path, [(f"k{n}.{end}", raw) for end, raw in members.items()])

    tars = [encoded(n, path) for n, path in enumerate(many)]
    keys = {"want": ("caption", "latents"), "caption_field": "other"}
    first, second = ShardDataset(tars, 8, **keys), ShardDataset(tars, 8, **keys)
    assert second.encoding == first.encoding and second.encoding["vae"] == "x" and len(files(tars)) == 1
    assert [second.read_text(row) for row in range(31)] == [first.read_text(row) for row in range(31)]


def test_few_shards_and_folders_that_cannot_be_written(many, monkeypatch):
    opened(many[:4])
    assert not files(many)
    before = len(opened(many[:5]))
    (file,) = files(many)
    file.unlink()
    monkeypatch.setattr("pathlib.Path.touch", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    assert len(opened(many[:5])) == before and not files(many)


def test_old_files_go_and_one_process_writes(many, reads):
    old = [many[0].parent / f"{PREFIX}{name}" for name in ("month.npz", "hour.claim", "hour.npz.00.tmp", "day.npz")]
    for file, age in zip(old, (31 * 86400, 3700, 3700, 86400), strict=True):
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    opened(many)
    (written,) = set(files(many)) - set(old)
    assert [file.exists() for file in old] == [False, False, False, True]
    written.unlink()
    written.with_suffix(".claim").touch()  # another process writes it
    opened(many)
    assert not written.exists() and len(reads) == 2


def test_what_was_gathered_is_not_prepared_again(many, monkeypatch):
    def prepare(**data):
        loads.clear()
        settings = SimpleNamespace(data=DataSettings(train=str(many[0].parent), **data))
        prepare_shards(SimpleNamespace(settings=settings, world=SimpleNamespace(rank=0, size=1)), "train")
        return len(loads)

    import trainer.training.shard_files as module

    loads, real = [], module.load_index
    monkeypatch.setattr(module, "load_index", lambda path: loads.append(path) or real(path))
    monkeypatch.setattr(module, "first_problem", lambda problem, world: problem)
    tars = sorted(many)
    assert prepare() == 31
    opened(tars)
    assert prepare() == 0 and prepare(filters=["score >= 3"]) == 31
    opened(tars, filters=["score >= 5"])
    assert prepare(filters=["score >= 3"]) == 0 and prepare(min_size=4) == 31
    os.utime(tars[0], (1, 1))
    assert prepare() == 31
