"""Building shards with the writer, from digits and from an image folder; validating shards."""

import builtins
import json
import os
import sys

import numpy as np
import pytest

from data.digits import PHRASINGS, WORDS, build_digits, caption
from data.errors import DataError
from data.image_folder import build_from_folder
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


@pytest.fixture
def pictures(tmp_path, encode):
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "sub/a.JPEG", "sub/v1.2.webp"]):
        form = {"jpg": "jpeg"}.get(name.rsplit(".")[-1].lower(), name.rsplit(".")[-1].lower())
        (root / name).write_bytes(encode((i * 50, 0, 0), form=form))
    return root


def by_file(shards):
    dataset = ShardDataset(shards, 8)
    return {item["meta"]["file"]: item for item in (dataset[p] for p in range(len(dataset)))}


@pytest.mark.parametrize("form", ["json", "jsonl", "tsv"])
def test_folder_with_a_captions_file(tmp_path, pictures, form):
    captions = {"a.png": "ä red", "sub/a.JPEG": 'say "hi"', "v1.2.webp": "by bare name"}
    lines = {
        "json": json.dumps(captions),
        "jsonl": "\n".join(json.dumps({"file": f, "caption": c}) for f, c in captions.items()) + "\n\n",
        "tsv": "\n".join(f"{f}\t{c}" for f, c in captions.items()) + "\n",
    }
    file = tmp_path / f"captions.{form}"
    file.write_text(lines[form], encoding="utf-8")
    report = build_from_folder(pictures, file, tmp_path / "out", per_shard=2)
    assert report["samples"] == 3 and report["rejects"] == {"no caption": 1} and len(report["shards"]) == 2
    items = by_file(report["shards"])
    assert {f: i["caption"] for f, i in items.items()} == {
        "a.png": "ä red",
        "sub/a.JPEG": 'say "hi"',
        "sub/v1.2.webp": "by bare name",
    }


def test_folder_with_captions_beside(tmp_path, pictures):
    (pictures / "a.txt").write_text("one")
    (pictures / "b.txt").write_bytes(b"\xff\xfe")
    (pictures / "sub" / "v1.2.txt").write_text("two")
    (pictures / "c.png").touch()
    (pictures / "c.txt").write_text("empty image")
    report = build_from_folder(pictures, None, tmp_path / "out")
    assert report["samples"] == 2
    assert report["rejects"] == {"caption is not UTF-8": 1, "no caption": 1, "empty image file": 1}
    tar = report["shards"][0].read_bytes()
    assert (pictures / "a.png").read_bytes() in tar and (pictures / "sub" / "v1.2.webp").read_bytes() in tar


def test_folder_mistakes(tmp_path, pictures):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="none of its 4 images is usable: 4 x no caption"):
        build_from_folder(pictures, None, out)
    with pytest.raises(DataError, match="nowhere does not exist"):
        build_from_folder(tmp_path / "nowhere", None, out)
    for name, text, named in [
        ("c.jsonl", '{"file": "a", "caption": "b"}\n{"file": "a"}', "line 2"),
        ("c.tsv", "a\tb\nc", "line 2"),
        ("c.json", '{"a":\n', "line 2"),
        ("d.json", "[1]", "single object"),
        ("c.csv", "a,b", "unknown"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name}.*{named}"):
            build_from_folder(pictures, tmp_path / name, out)


def test_validate(shards):
    change = {1: {"txt": None}, 2: {"txt": b"\xff"}, 3: {"png": b"broken"}}
    tars = shards(24, change=change)
    report = validate(tars)
    assert report["samples"] == 22 and report["shards"] == 3 and report["broken"] == {}
    assert report["rejects"] == {"no caption (.txt)": 1, "text is not UTF-8": 1}
    assert report["bytes"] == sum(t.stat().st_size for t in tars)
    assert 2 <= report["caption_mean_length"] <= 3
    decoded = validate(tars, decode=True)
    assert decoded["samples"] == 21 and decoded["rejects"]["image does not decode"] == 1
    os.truncate(tars[1], 3000)
    tars[2].unlink()
    report = validate(tars)
    assert report["samples"] == 8
    assert "truncated" in report["broken"][str(tars[1])] and str(tars[2]) in report["broken"]
