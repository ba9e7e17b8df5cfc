"""Shards from a folder: which images are read, and with whose caption."""

import json
import os

import pytest

from data.captions import SEVERAL_CAPTIONS, SHARED_NAME
from data.errors import DataError
from data.image_folder import build_from_folder
from data.shard_dataset import ShardDataset


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


def captioned(root, out, entries, form="json"):
    """{image: caption} and the counts of a folder with these entries as its captions file."""
    file = root.parent / f"captions.{form}"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    report = build_from_folder(root, file, out)
    return {name: item["caption"] for name, item in by_file(report["shards"]).items()}, report


def test_whose_caption_it_is(tmp_path, encode):
    """By path, else the .txt, else by a bare name that only one image has."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = tmp_path / "pictures"
    for name in (
        *("cat.png", "a/cat.png", "b/cat.png", "b/dog.png", "b/owl.png", "a/fox.png", "b/fox.png"),
        *(f"{decomposed}.png", f"{composed}/{composed}.png", f"{composed}/{decomposed}.png"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode())
    (root / "b" / "cat.txt").write_text("b's own")
    (root / "b" / "dog.TXT").write_text("dog's own")
    entries = {
        "cat.png": "above",
        "dog.png": "bare",
        "owl.png": "an owl",
        "fox.png": "which?",
        f"{composed}.png": "a café",
    }
    entries |= {f"{decomposed}/{decomposed}.png": "which?", "nobody.png": "x", "./b/cat.png/../nothing.png": "x"}
    found, report = captioned(root, tmp_path / "out", entries)
    assert found == {
        "cat.png": "above",
        "b/cat.png": "b's own",
        "b/dog.png": "dog's own",
        "b/owl.png": "an owl",
        f"{decomposed}.png": "a café",
    }
    assert report["rejects"] == {"no caption": 3, SHARED_NAME: 2}
    assert report["ignored"] == {"entry of the captions file without an image that needs it": 5}


@pytest.mark.parametrize(
    "value, reason",
    [
        ("null", "caption is null, not text"),
        ('["one", "two"]', "caption is a list, not text"),
        ('{"en": "one"}', "caption is an object, not text"),
        ("NaN", "caption is a number, not text"),
        ("true", "caption is a boolean, not text"),
        ('"a\\u0000b"', "caption has a NUL character"),
        ('"\\ud800"', "caption has half a surrogate pair"),
        ('"\\ufeff "', "empty caption"),
        ('"one", "a.png": "two"', SEVERAL_CAPTIONS),
    ],
)
def test_what_is_no_caption(tmp_path, pictures, value, reason):
    found, report = captioned(pictures, tmp_path / "out", f'\ufeff{{"a.png": {value}, "b.jpg": "\ufeffb"}}')
    assert found == {"b.jpg": "b"} and report["rejects"] == {reason: 1, "no caption": 2}
    if not value.endswith('"two"'):
        lines = f'{{"file": "a.png", "caption": {value}}}\n{{"file": "b.jpg", "caption": "b"}}'
        assert captioned(pictures, tmp_path / "out2", lines, "jsonl")[1]["rejects"] == report["rejects"]


def test_every_image_of_a_folder(tmp_path, encode):
    """Other formats, names with dots, linked folders; what is not read is told."""
    root, other = tmp_path / "pictures", tmp_path / "other"
    (root / ".hidden").mkdir(parents=True)
    other.mkdir()
    forms = {"a.gif": "GIF", "b.BMP": "BMP", "c.tiff": "TIFF", "d.jfif": "JPEG", "e.avif": "AVIF", "cat.png": "PNG"}
    forms |= {"cat.v2.png": "PNG", "linked/f.png": "PNG"}
    (root / "linked").symlink_to(other)
    (other / "back").symlink_to(root)
    (other / "own").symlink_to(other)
    for name, form in forms.items():
        (root / name).write_bytes(encode(form=form))
        (root / name).with_suffix(".txt").write_text(name)
    for name in ("._cat.png", "._cat.txt", "note.heic", "alone.txt", "README", "raw.CR2"):
        (root / name).write_bytes(b"\0\5\x16\7")
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    (root / "gone.txt").write_text("x")
    os.mkfifo(root / "pipe.png")
    report = build_from_folder(root, None, tmp_path / "out")
    assert {name: item["caption"] for name, item in by_file(report["shards"]).items()} == {n: n for n in forms}
    assert report["rejects"] == {"cannot be read (No such file or directory)": 1, "not a file": 1}
    assert report["ignored"] == {
        "hidden folder": 1,
        "hidden file": 2,
        ".heic, no image": 1,
        ".cr2, no image": 1,
        "file without extension, no image": 1,
        "link back into a folder that it is in": 2,
        ".txt without an image": 1,
    }


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
        ("c.csv", "a,b", "looked for one of file, path, image.* and one of caption"),
        ("d.csv", "file,caption\na.png,x\nb.jpg,y,z", "line 3"),
        ("d.tsv", "path\ttext\na.png", "line 2"),
        ("d.jsonl", '{"file": "a", "title": "b"}', "looked for one of caption, text, prompt among file, title"),
        ("c.parquet", "x", "cannot be read as Parquet"),
        ("c.xml", "x", "unknown"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name}.*{named}"):
            build_from_folder(pictures, tmp_path / name, out)
