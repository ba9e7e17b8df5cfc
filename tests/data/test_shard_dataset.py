"""Samples by position. Broken ones are counted, and replaced by the same ones everywhere."""

import os
import pickle

import pytest
import torch

from data.errors import DataError
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_index import load_index
from data.validate import validate


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
    assert dataset.rejected == {"no caption (.txt)": 1, f"no image (.{', .'.join(DataSettings().image_keys)})": 1}
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
        ({"txt": b"\xff\xfe"}, "caption is not UTF-8"),
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


@pytest.mark.parametrize(
    "damage, reason",
    [
        ({"txt": b"a\0b"}, "caption has a NUL character"),
        ({"txt": b"\xef\xbb\xbf"}, "empty caption"),
        ({"json": b"[" * 100_000}, "json does not parse"),
        ({"json": b"1" * 5000}, "json does not parse"),  # more digits than Python converts
        ({"png": b"<html>404</html>"}, "image does not decode"),
    ],
)
def test_nothing_in_a_sample_ends_a_run(shards, damage, reason):
    dataset = ShardDataset(shards(24, change={7: damage}), 8)
    assert dataset[position_of(dataset, 7)]["skipped"] == {reason: 1}
    assert 7 not in dataset.texts() or "image" in reason


def test_captions_without_byte_order_mark(shards):
    dataset = ShardDataset(
        shards(2, change={1: {"txt": b"\xef\xbb\xbfa red square\r\n", "json": b'\xef\xbb\xbf{"a": 1}'}}), 8
    )
    assert dataset.read(1)["caption"] == "a red square" and dataset.read(1)["meta"] == {"a": 1}


def test_captions_from_a_field_of_the_json(shards):
    values = [b'"one"', b"null", b'["a", "b"]', b"NaN", b'{"en": "a"}', b"3", b'" "', b'"a\\u0000b"', b'"\\ud800"']
    change = {i: {"txt": None, "json": b'{"prompt": %s}' % value} for i, value in enumerate(values)}
    change |= {9: {"txt": None}, 10: {"json": None}}
    tars = shards(12, 12, change=change)
    dataset = ShardDataset(tars, 8, want={"caption"}, caption_field="prompt")
    assert {row: text["caption"] for row, text in dataset.texts().items()} == {0: "one"}
    assert dataset.rejected == {
        "no caption (.json)": 1,
        "caption is null, not text": 1,
        "caption is a list, not text": 1,
        "caption is a number, not text": 2,
        "caption is an object, not text": 1,
        "empty caption": 1,
        "caption has a NUL character": 1,
        "caption has half a surrogate pair": 1,
        "json has no field 'prompt'": 2,
    }


def test_the_message_leads_to_the_field_and_not_to_raw_json(shards):
    change = {i: {"txt": None, "json": b'{"prompt": "a", "width": 16}'} for i in range(10)}
    tars = shards(10, change=change)
    with pytest.raises(DataError, match=r"text fields prompt in the .json.*data.caption_field"):
        ShardDataset(tars, 8)
    for key in ("json", "JSON", "meta.json"):
        with pytest.raises(DataError, match="data.caption_field"):
            ShardDataset(tars, 8, caption_key=key)
    assert ShardDataset(tars, 8, caption_field="prompt")[0]["caption"] == "a"


def test_empty_shards_are_skipped_and_counted(shards, pack):
    tars = shards(20)
    empty = [pack(tars[0].parent / "a.tar", []), tars[0].parent / "z.tar"]
    empty[1].touch()
    dataset = ShardDataset([empty[0], *tars, empty[1]], 8)
    assert len(dataset) == 20 and dataset.rejected == {"empty shard": 2} and dataset.paths == tars
    report = validate([empty[0], *tars, empty[1]])
    assert report["samples"] == 20 and report["empty"] == [str(file) for file in empty] and not report["broken"]
    with pytest.raises(DataError, match="none of the 2 shards has a sample"):
        ShardDataset(empty, 8)


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
