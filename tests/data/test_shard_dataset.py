"""Samples by position. Broken ones are counted, and replaced by the same ones everywhere."""

import os
import pickle

import pytest
import torch

from data.errors import DataError
from data.shard_dataset import ShardDataset
from data.shard_index import load_index


def position_of(dataset, row):
    return next(p for p in range(len(dataset)) if dataset.order.row(p) == row)


def test_an_epoch_is_every_sample_once(shards):
    dataset = ShardDataset(shards(24), 8, seed=5)
    for epoch in range(2):
        items = [dataset[p] for p in range(epoch * 24, epoch * 24 + 24)]
        assert sorted(item["meta"]["row"] for item in items) == list(range(24))
        for item in items:
            row = item["meta"]["row"]
            assert item["caption"] == f"c{row}" and item["key"] == f"k{row:04d}"
            assert torch.equal(item["image"][:, 3, 3], torch.tensor([row / 127.5 - 1, -1, -1]))
    assert item["image"].shape == (3, 8, 8) and item["original_size"] == (8, 8) and item["crop"] == (0, 0)
    assert item["position"] == 47 and item["skipped"] == {}


def test_missing_members_are_left_out_and_counted(shards):
    tars = shards(24, change={3: {"txt": None}, 11: {"png": None}, 12: {"json": None}})
    dataset = ShardDataset(tars, 8)
    assert len(dataset) == 22
    assert dataset.rejected == {"no caption (.txt)": 1, "no image (.png, .jpg, .jpeg, .webp)": 1}
    assert {dataset[p]["key"] for p in range(22)} == {f"k{i:04d}" for i in range(24)} - {"k0003", "k0011"}
    assert dataset[position_of(dataset, 10)]["meta"] == {}  # row 10 is sample 12
    assert len(ShardDataset(tars, 8, want={"caption"})) == 23
    assert len(ShardDataset(tars, 8, want={"image"})) == 23


def test_reading_captions_reads_no_image(shards, monkeypatch):
    tars = shards(10)
    images = {int(o) for o in load_index(tars[0]).locate(["png"])[0]}
    offsets = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, o: offsets.append(o) or real(f, n, o))
    item = ShardDataset(tars, 8, want={"caption", "meta"})[0]
    assert "image" not in item and item["caption"].startswith("c")
    assert len(offsets) == 2 and not images & set(offsets)


@pytest.mark.parametrize(
    "damage, reason",
    [
        ({"png": b"broken"}, "image does not decode"),
        ({"txt": b" \n"}, "empty caption"),
        ({"txt": b"\xff\xfe"}, "text is not UTF-8"),
        ({"json": b"{"}, "json does not parse"),
        ({"json": b"[1]"}, "json is not an object"),
    ],
)
def test_a_broken_sample_is_replaced_by_the_next(shards, damage, reason):
    dataset = ShardDataset(shards(24, change={7: damage}), 8, seed=2)
    position = position_of(dataset, 7)
    item = dataset[position]
    assert item["skipped"] == {reason: 1} and item["position"] == position
    assert item["key"] == dataset[(position + 1) % 24]["key"] and dataset[(position + 1) % 24]["skipped"] == {}


def test_replacement_wraps_within_the_epoch(shards):
    tars = shards(24)
    last = ShardDataset(tars, 8, seed=2).order.row(47)  # the last of epoch 1
    dataset = ShardDataset(shards(24, change={last: {"png": b"broken"}}), 8, seed=2)
    assert dataset[47]["key"] == dataset[24]["key"]


def test_gives_up_on_a_broken_data_set(shards):
    dataset = ShardDataset(shards(120, 120, change={i: {"png": b"broken"} for i in range(120)}), 8)
    with pytest.raises(DataError, match=r"100 samples in a row .*100 x image does not decode.*s-000000.tar, key k\d+"):
        dataset[0]


def test_a_truncated_or_deleted_shard_is_named(shards):
    tars = shards(10)
    dataset = ShardDataset(tars, 8)
    os.truncate(tars[0], 600)
    with pytest.raises(DataError, match="s-000000.tar"):
        [dataset[p] for p in range(10)]
    dataset.close()
    tars[0].unlink()
    with pytest.raises(DataError, match="s-000000.tar.*No such file"):
        dataset[0]


def test_few_files_stay_open(shards, monkeypatch):
    monkeypatch.setattr("data.shard_dataset.OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    dataset = ShardDataset(shards(24, per_shard=2), 8)
    captions = {dataset[p]["caption"] for p in range(24)}
    assert len(captions) == 24 and len(os.listdir("/proc/self/fd")) == before + 2
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_process_opens_its_own_files(shards):
    dataset = ShardDataset(shards(10), 8)
    wanted = dataset[3]["key"]
    copy = pickle.loads(pickle.dumps(dataset))  # as in a spawned loader, with file numbers that it does not have
    copy._process, copy._files = -1, {0: 987_654}
    assert copy[3]["key"] == wanted


def test_wrong_arguments(shards):
    with pytest.raises(ValueError, match="imgae"):
        ShardDataset(shards(10), 8, want={"imgae"})
    with pytest.raises(DataError, match="no shards"):
        ShardDataset([], 8)
