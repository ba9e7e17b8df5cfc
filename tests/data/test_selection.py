"""Filters, buckets, crops and captions of real shards: which samples are read, in which shape, and how that is known."""

import json
import os
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import auto_shapes, check_shapes
from data.errors import DataError
from data.images import decode, resize_and_crop
from data.loader import Batches
from data.sampling_order import BatchSplit
from data.selected_rows import nearest_bucket
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_facts import facts_file

SIZES = [(16, 16), (16, 8), (8, 16), (30, 20), (20, 30), (7, 9)]  # width, height: two of each of three shapes
BUCKETS = [(8, 8), (8, 16), (16, 8)]


@pytest.fixture
def sized(shards, encode):
    """24 samples of six sizes in turn, in three shards; sample i has the score i / 4, and "nsfw" where i is odd."""

    def build(change=None, folder="sized"):
        samples = {
            i: {
                "png": encode((i, 0, 0), size=SIZES[i % 6]),
                "json": json.dumps({"row": i, "score": i / 4, "nsfw": bool(i % 2), "more": {"lang": "de"}}).encode(),
            }
            for i in range(24)
        }
        for i, members in (change or {}).items():
            samples[i] |= members
        return shards(24, change=samples, folder=folder)

    return build


def opened(tars, batch=1, want=("image", "caption", "meta"), seed=0, **data):
    settings = DataSettings(resolution=8, **data)
    return ShardDataset(tars, 8, want, seed, **settings.keys, batch=batch)


def rows_in(dataset) -> list[int]:
    return [dataset.read(row)["meta"]["row"] for row in range(len(dataset))]


def test_shapes():
    shapes = auto_shapes(1024, 64)
    assert shapes[:3] == [(1024, 1024), (960, 1088), (1088, 960)]
    assert {(832, 1216), (896, 1152), (768, 1344), (704, 1408)} < set(shapes) and len(shapes) == 11
    assert all(
        0.9 * 1024**2 <= h * w <= 1024**2 and h % 64 == w % 64 == 0 and max(h, w) <= 2 * min(h, w) for h, w in shapes
    )
    assert auto_shapes(8, 8) == [(8, 8)]
    with pytest.raises(ValueError, match="resolution=1000 is not a multiple of bucket_step=64"):
        DataSettings(resolution=1000, buckets="auto")
    for wrong in ([(8, 8), (8, 8)], [(8, 0)], [(8, 80)]):
        with pytest.raises(ValueError, match="bucket"):
            check_shapes(wrong)
    for wrong in ("automatic", [8, 8], [[8, 8, 8]], [[8, "a"]]):
        with pytest.raises(ValueError, match=r'must be "auto" or a list of \[height, width\]'):
            DataSettings(buckets=wrong)
    settings = DataSettings(resolution=16, buckets=[[8, 16], [16, 8]])
    assert settings.size == (8, 16) and DataSettings(resolution=16).size == (16, 16)
    assert DataSettings(buckets="auto").size == (1024, 1024)


def test_nearest_by_aspect_ratio():
    sizes = np.array([(512, 512), (512, 1000), (1000, 400), (100, 141), (100, 142)])
    assert nearest_bucket(sizes, BUCKETS).tolist() == [0, 1, 2, 0, 1]  # the border is sqrt(2)
    assert nearest_bucket(sizes[:1], [(8, 16), (16, 8)]).tolist() == [0]  # of equally near ones the first


def test_images_are_resized_to_cover_their_bucket_and_cropped_to_it():
    image = decode_noise((20, 30))
    part, corner = resize_and_crop(image, (8, 16))
    assert part.shape == (3, 8, 16) and corner == (1, 0)  # resized to 11 x 16
    whole, _ = resize_and_crop(image, (11, 16))
    assert torch.equal(part, whole[:, 1:9])
    flipped, corner = resize_and_crop(image, (20, 10), (0.0, 0.0), flip=True)
    assert corner == (0, 20) and torch.equal(flipped, resize_and_crop(image, (20, 10), (0.0, 0.0))[0].flip(2))
    corners = {resize_and_crop(image, (20, 10), (0.5, share))[1] for share in (0.0, 0.3, 0.999)}
    assert corners == {(0, 0), (0, 6), (0, 20)}


def decode_noise(size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, *size), dtype=np.uint8))


def test_a_step_has_one_shape_for_any_split_workers_and_restart(sized):
    tars = sized()
    split = BatchSplit(1, 4)

    def steps(split, start, n, workers=0):
        ranks = [Batches(opened(tars, 4, buckets=BUCKETS), split, rank, start, workers) for rank in range(split.world)]
        found = []
        for _ in range(n):
            step = {}
            for batches in ranks:
                for batch in islice(batches, split.accumulation):
                    assert tuple(batch.images.shape[2:]) == batch.size
                    rows = [(batch.size, meta["row"]) for meta in batch.meta]
                    step |= dict(zip(batch.index, rows, strict=True))
            found.append(step)
        for batches in ranks:
            batches.close()
        return found

    wanted = steps(split, 0, 12)
    for step in wanted:
        ((shape, _),) = Counter(shape for shape, _ in step.values()).items()
        assert {BUCKETS[[0, 1, 2, 1, 2, 0][row % 6]] for _, row in step.values()} == {shape}
    first = [row for step in wanted[:6] for _, row in step.values()]
    assert sorted(first) == list(range(24))  # 8 samples of each bucket: an epoch is six steps
    for world, micro, accumulation, workers in ((2, 2, 1, 0), (1, 2, 2, 2), (4, 1, 1, 0)):
        assert steps(BatchSplit(world, micro, accumulation), 5, 3, workers) == wanted[5:8]


def test_fewer_samples_than_a_batch_and_broken_ones_stay_in_their_bucket(sized):
    tars = sized({2: {"png": b"\x89PNG"}, 3: {"png": None}})
    for broken in (8, 14):  # pixels that are damaged: known when they are read
        tars = sized({broken: {"png": damaged(tars, broken)}}, folder=f"b{broken}")
        dataset = opened(tars, 100, buckets=BUCKETS)
        shape = dataset.size(broken)
        found = [dataset.example(number, dataset.shapes.index(shape)) for number in range(40)]
        assert {sample["size"] for sample in found} == {shape}
        assert broken not in {sample["meta"]["row"] for sample in found}
        assert sum(sum(sample["skipped"].values()) for sample in found) > 0


def damaged(tars, row):
    raw = bytearray(ShardDataset(tars, 8)._read(row, "image"))
    at = raw.index(b"IDAT") + 6
    raw[at : at + 8] = b"\0" * 8
    return bytes(raw)


@pytest.mark.parametrize(
    "data, kept",
    [
        ({"filters": ["score >= 3"]}, range(12, 24)),
        ({"filters": ["nsfw == false", "score < 2"]}, range(0, 8, 2)),
        ({"filters": ["more.lang == de", "row != 5"]}, [i for i in range(24) if i != 5]),
        ({"filters": ["width >= 20", "height >= 20"]}, [i for i in range(24) if i % 6 in (3, 4)]),
        ({"filters": ["aspect <= 1.5"]}, [i for i in range(24) if i % 6 in (0, 3, 4, 5)]),
        ({"filters": ["caption_length > 2"]}, range(10, 24)),
        ({"min_size": 16}, [i for i in range(24) if i % 6 in (0, 3, 4)]),
    ],
)
def test_what_is_left(sized, data, kept):
    dataset = opened(sized(), **data)
    assert rows_in(dataset) == list(kept)
    assert sum(dataset.rejected.values()) == 24 - len(kept)


def test_rejects_are_counted_by_their_first_reason(sized):
    tars = sized({0: {"json": b"{}"}, 1: {"png": b"no png"}, 2: {"json": b'{"score": "9"}'}})
    dataset = opened(tars, min_size=8, filters=["score >= 1", "nsfw == false"])
    assert dataset.rejected == {
        "image size is not readable": 1,
        "left out: short side below 8 pixels": 4,  # 7 x 9
        "left out: no number score for the filter score >= 1.0": 2,
        "left out: not score >= 1.0": 1,
        "left out: not nsfw == false": 6,
    }
    with pytest.raises(
        DataError, match=r"no sample of .* is left \(24 x left out: not score >= 100.0\): change data.filters"
    ):
        opened(sized(folder="again"), filters=["score >= 100"])


def test_facts_are_saved_and_follow_the_shard(sized, monkeypatch):
    tars = sized()
    first = rows_in(opened(tars, filters=["score >= 2"], buckets=BUCKETS))
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(1) or pread(*args))
    opened(tars, filters=["score >= 2"], buckets=BUCKETS)
    opened(tars, filters=["score < 1"], min_size=4)
    assert not read  # other limits on the same facts
    opened(tars, filters=["row >= 2"])
    assert len(read) == 24 and opened(tars, filters=["score >= 2"])  # only the new field
    assert len(read) == 24
    facts_file(tars[0]).write_bytes(facts_file(tars[0]).read_bytes()[:100])  # an interrupted copy
    opened(tars, filters=["score >= 2"])
    assert len(read) > 24
    monkeypatch.undo()
    again = sized({i: {"json": b'{"row": %d, "score": 0}' % i} for i in range(12)})
    assert rows_in(opened(again, filters=["score >= 2"])) == [row for row in first if row >= 12]
    for tar in again:
        facts_file(tar).unlink()
    monkeypatch.setattr("data.shard_facts.write_npz", lambda *_: False)  # as in a folder that cannot be written
    assert rows_in(opened(again, filters=["score >= 2"])) == [row for row in first if row >= 12]
    assert not facts_file(again[0]).exists()


def test_captions_of_several_sources_come_by_their_weights(shards):
    rows = {
        i: {"json": json.dumps({"row": i, "blip": f"b{i}"} | ({"alt": f"a{i}"} if i % 2 else {})).encode()}
        for i in range(24)
    }
    rows[4]["txt"] = b" "
    tars = shards(24, change=rows)
    weights = {"txt": 1, "blip": 2, "alt": 1}
    dataset = opened(tars, caption_field=weights, want=("caption", "meta"))
    found = [dataset[position] for position in range(24 * 40)]
    kinds = Counter(sample["caption"][0] for sample in found if sample["meta"]["row"] % 2)
    assert all(sample["caption"][1:] == str(sample["meta"]["row"]) for sample in found)
    assert abs(kinds["b"] / kinds.total() - 0.5) < 0.06 and abs(kinds["a"] / kinds.total() - 0.25) < 0.06
    assert {s["caption"] for s in found if s["meta"]["row"] == 4} == {"b4"}  # the only one
    again = opened(tars, caption_field=weights, want=("caption", "meta"))
    assert [again[position]["caption"] for position in range(500, 520)] == [s["caption"] for s in found[500:520]]
    other = opened(tars, caption_field=weights, want=("caption", "meta"), seed=1)
    assert [other[p]["caption"][0] for p in range(48)] != [s["caption"][0] for s in found[:48]]
    assert opened(tars, caption_field={"blip": 1})[0]["caption"].startswith("b")
    for wrong in ({"txt": 0}, {"txt": "x"}, ["txt"]):
        with pytest.raises(ValueError, match="name: weight"):
            DataSettings(caption_field=wrong)


def test_random_crops_and_flips_belong_to_the_position(tmp_path, shards, encode):
    image = Image.effect_noise((24, 8), 90).convert("RGB")
    tars = shards(12, change={i: {"png": encode(image=image)} for i in range(12)})
    chosen = DataSettings(resolution=8).selection
    plain, crops, flips = (
        ShardDataset(tars, 8, seed=5, selection=type(chosen)(random_crop=crop, flip=flip))
        for crop, flip in ((False, False), (True, False), (False, True))
    )
    corners = [crops[position]["crop"] for position in range(60)]
    assert len(set(corners)) > 8 and all(top == 0 and 0 <= left <= 16 for top, left in corners)
    pixels = decode(encode(image=image)).float() / 127.5 - 1
    for position in range(0, 60, 7):
        left = corners[position][1]
        assert torch.equal(crops[position]["image"], pixels[:, :, left : left + 8])
    turned = [torch.equal(flips[p]["image"], plain[p]["image"].flip(2)) for p in range(60)]
    assert 15 < sum(turned) < 45
    assert [crops[position]["crop"] for position in reversed(range(60))] == corners[::-1]
    assert torch.equal(crops.read(3)["image"], plain.read(3)["image"])  # without a position: the centre
