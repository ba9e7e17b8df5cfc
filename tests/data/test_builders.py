"""Building shards with the writer and from digits; validating shards."""

import builtins
import os
import sys

import numpy as np
import pytest

from data import shard_dataset
from data.digits import PHRASINGS, WORDS, build_digits, caption
from data.errors import DataError
from data.images import resize_and_crop
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_index import index_file, load_index
from data.shard_patterns import expand
from data.shard_writer import write_shards
from data.validate import validate


def samples(n, first=0):
    return ({"__key__": f"k{i}", "png": b"x", "txt": f"ç{i}", "json": {"i": i}} for i in range(first, n))


def test_writer(tmp_path):
    shards = write_shards(samples(25), tmp_path / "new" / "folder", "a", 10)
    assert [s.name for s in shards] == [f"a-{i:06d}.tar" for i in range(3)]
    assert [len(load_index(s)) for s in shards] == [10, 10, 5]
    names = {p.name for p in shards[0].parent.iterdir()}
    assert names == {s.name for s in shards} | {index_file(s).name for s in shards}
    item = ShardDataset(shards, 8, want={"caption", "meta"})[0]
    assert item["caption"] == f"ç{item['meta']['i']}"
    again = write_shards(samples(25), tmp_path / "again", "a", 10)
    assert [s.read_bytes() for s in again] == [s.read_bytes() for s in shards]


def test_writer_overwrites_only_on_request(tmp_path):
    write_shards(samples(25), tmp_path, "a", 10)
    write_shards(samples(5), tmp_path, "a-b", 10)  # another prefix
    with pytest.raises(DataError, match="already holds a-000000.tar"):
        write_shards(samples(5), tmp_path, "a", 10)
    write_shards(samples(5), tmp_path, "a", 10, overwrite=True)
    assert [p.name for p in expand(str(tmp_path))] == ["a-000000.tar", "a-b-000000.tar"]
    assert len(list(tmp_path.iterdir())) == 4  # the removed shards' indexes are gone too


def test_a_failing_writer_leaves_no_partial_shard(tmp_path):
    def failing():
        yield from samples(15)
        raise KeyError("source")

    with pytest.raises(KeyError):
        write_shards(failing(), tmp_path, "a", 10)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a-000000.tar", "a-000000.tar.index.npz"]


def test_writer_does_not_collect_a_shard_in_memory(tmp_path):
    made = []

    def counted():
        for sample in samples(20):
            made.append(sample["__key__"])
            if len(made) == 10:
                assert (tmp_path / "a-000000.tar.tmp").exists()
            yield sample

    write_shards(counted(), tmp_path, "a", 20)


def test_writer_names_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write shards into .*file"):
        write_shards(samples(1), tmp_path / "file", "a")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    return out, build_digits(out)


def test_digits(digits):
    out, counts = digits
    assert counts == {"train": 1347, "heldout": 450}
    assert len(expand(f"{out}/train-*.tar")) >= 2
    seen = {}
    for prefix in ("train", "heldout"):
        dataset = ShardDataset(expand(f"{out}/{prefix}-*.tar"), 8)
        assert len(dataset) == counts[prefix]
        items = [dataset[p] for p in range(len(dataset))]
        seen[prefix] = {item["meta"]["index"] for item in items}
        classes = [item["meta"]["class"] for item in items]
        shares = np.bincount(classes, minlength=10) / len(items)
        assert shares.min() > 0.09 and shares.max() < 0.11  # stratified
        used = set()
        for item in items:
            word = WORDS[item["meta"]["class"]]
            matching = [p for p in range(len(PHRASINGS)) if item["caption"] == PHRASINGS[p].format(word)]
            assert len(matching) == 1
            used.update(matching)
        assert used == set(range(len(PHRASINGS)))
    assert not seen["train"] & seen["heldout"] and len(seen["train"] | seen["heldout"]) == 1797


def test_digits_pixels_are_the_real_ones(digits):
    from sklearn.datasets import load_digits

    dataset = ShardDataset(expand(str(digits[0])), 8)
    real = load_digits().images
    for position in range(0, 200, 20):
        item = dataset[position]
        grey = (item["image"] + 1) * 127.5
        assert np.abs(grey.numpy() - np.round(real[item["meta"]["index"]] * 255 / 16)).max() < 0.01
        assert item["original_size"] == (8, 8)


def test_digits_again(digits, tmp_path):
    out, counts = digits
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert build_digits(out) == counts
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(DataError, match="another seed"):
        build_digits(out, seed=1)
    build_digits(tmp_path)
    assert all((tmp_path / p.name).read_bytes() == p.read_bytes() for p in out.glob("*.tar"))
    (tmp_path / "heldout-000001.tar").unlink()  # as after an interrupted build
    build_digits(tmp_path)
    assert all((tmp_path / p.name).read_bytes() == p.read_bytes() for p in out.glob("*.tar"))


def test_caption():
    assert caption(7, 0) == "a handwritten seven"


def test_digits_without_scikit_learn(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **more)

    for module in [m for m in sys.modules if m.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"pip install 'disback\[demo\]'"):
        build_digits(tmp_path)


def test_validate(shards, monkeypatch):
    change = {1: {"txt": None}, 2: {"txt": b"\xff"}, 3: {"png": b"broken"}}
    tars = shards(24, change=change)
    report = validate(tars)
    assert report["samples"] == 22 and report["shards"] == 3 and report["broken"] == {}
    assert report["rejects"] == {"no caption (.txt)": 1, "caption is not UTF-8": 1}
    assert report["bytes"] == sum(t.stat().st_size for t in tars)
    assert 2 <= report["caption_mean_length"] <= 3
    decoded = validate(tars, decode=True, settings=DataSettings(resolution=8))
    assert decoded["samples"] == 21 and decoded["rejects"]["image does not decode"] == 1
    sides, real = [], resize_and_crop
    monkeypatch.setattr(
        shard_dataset, "resize_and_crop", lambda image, size, *more: sides.append(size[0]) or real(image, size, *more)
    )
    assert validate(tars[2:], True)["samples"] == 4 and sides == [1024] * 4  # the default of a run
    assert validate(tars, settings=DataSettings(caption_field="row"))["rejects"] == {
        "caption is a number, not text": 24
    }
    os.truncate(tars[1], 3000)
    tars[2].unlink()
    report = validate(tars)
    assert report["samples"] == 8
    assert "truncated" in report["broken"][str(tars[1])] and str(tars[2]) in report["broken"]
