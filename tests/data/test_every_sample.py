"""Over random folders, captions files and shards: every sample is read with its own caption, or counted; nothing else.

An image's colour and its caption carry the number of the sample, so a mixed-up pair shows. What is expected stands in the
generators, which know which text they wrote for which image.
"""

import io
import json
import random
import unicodedata
from collections import Counter

import pytest
from PIL import Image

from data.image_folder import build_from_folder
from data.settings import DataSettings
from data.shard_dataset import SampleError, ShardDataset
from data.validate import validate

CASES = 150  # of folders, and of sets of shards
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
STEMS = [
    "cat",
    "Cat",
    "CAT",
    "cat.v2",
    "cat.v2.final",
    "ca",
    "cat_",
    "cat.png",
    COMPOSED,
    DECOMPOSED,
    "日本",
    "a b",
    "1",
]
FOLDERS = ["", "a/", "A/", "a/b.c/", COMPOSED + "/"]
FORMS = {"png": "PNG", "PNG": "PNG", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "TIFF": "TIFF", "webp": "WEBP"}
BAD_CAPTIONS = [None, ["one", "two"], {"text": "x"}, float("nan"), 3, True, "", " \n", "\ufeff", "nul\0", "\ud800"]
BAD_TEXTS = [b"", b"  ", b"\xff\xfea\0", b"a\0b", b"\xef\xbb\xbf"]
BAD_IMAGES = [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"RIFF....WEBPVP8X"]


@pytest.fixture(scope="module")
def picture():
    """Bytes of an image whose colour is a number: one of the reds of a sample."""
    made = {}

    def build(number: int, form: str) -> bytes:
        if (number, form) not in made:
            file = io.BytesIO()
            options = {"lossless": True} if form == "WEBP" else {}
            Image.new("RGB", (3, 2), (number, 7, 7)).save(file, form, **options)
            made[number, form] = file.getvalue()
        return made[number, form]

    return build


def read_all(dataset: ShardDataset) -> tuple[list[dict], Counter]:
    """The samples of one epoch, each row once, and the counts of the others."""
    rejects, found = Counter(dataset.rejected), []
    for row in range(len(dataset)):
        try:
            found.append(dataset.read(row))
        except SampleError as reason:
            rejects[str(reason)] += 1
    dataset.close()
    return found, rejects


def number_of(item: dict) -> int:
    return round((float(item["image"][0].mean()) + 1) * 127.5)


def written(rng: random.Random, caption: str) -> bytes:
    """A caption as some editor saves it."""
    return rng.choice([b"", b"\xef\xbb\xbf"]) + caption.encode() + rng.choice([b"", b"\n", b"\r\n"])


@pytest.mark.parametrize("part", range(3))
def test_folders(tmp_path, picture, part):
    for case in range(part * CASES // 3, (part + 1) * CASES // 3):
        check_folder(tmp_path / str(case), random.Random(case), picture)


def check_folder(place, rng, picture):
    root, out = place / "root", place / "out"
    (root / "a" / "b.c").mkdir(parents=True)
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    forms = ["png"] * 4 + list(FORMS)
    drawn = (f"{rng.choice(FOLDERS)}{rng.choice(STEMS)}.{rng.choice(forms)}" for _ in range(rng.randint(1, 14)))
    names = list(dict.fromkeys(drawn))
    names.append("sure.png")
    elsewhere = place / "elsewhere"  # reached by a link only
    elsewhere.mkdir()
    if rng.random() < 0.5:
        (root / "linked").symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(root)
        names.append("linked/cat.png")
    broken, own, sure = set(), {name: set() for name in names}, set()
    for number, name in enumerate(names):
        raw = picture(number, FORMS[name.rpartition(".")[2]])
        if name != "sure.png" and rng.random() < 0.15:
            raw = rng.choice(BAD_IMAGES)
            broken.add(name)
        (root / name).write_bytes(raw)

    entries, stems = [], Counter(name.rpartition(".")[0] for name in names)
    for number, name in enumerate(names):
        stem, bare, kind = name.rpartition(".")[0], name.rpartition("/")[2], rng.random()
        text = root / f"{stem}.txt"
        if name == "sure.png" or kind < 0.35:  # next to the image: for all images of that name
            caption = f"beside {number}"
            text.write_bytes(written(rng, caption))
            for other in names:
                if other.rpartition(".")[0] == stem:
                    own[other] = {c for c in own[other] if not c.startswith("beside")} | {caption}
            sure |= {name} if stems[stem] == 1 else set()
        elif kind < 0.45 and not text.exists() and stems[stem] == 1:
            text.write_bytes(rng.choice(BAD_TEXTS))
        elif kind < 0.7:  # in the captions file by path, as it is or in another form
            caption, form = f"path {number}", rng.choice(["", "./", "NFC", "NFD"])
            written_as = unicodedata.normalize(form, name) if form[:1] == "N" else form + name
            entries.append((written_as, caption))
            own[written_as if written_as in names else name].add(caption)
            sure |= {name} if form in ("", "./") else set()
        elif kind < 0.8:
            entries.append((name, rng.choice(BAD_CAPTIONS)))
        elif kind < 0.95:
            entries.append((bare, f"bare {number}"))
            own[bare if bare in names else name].add(f"bare {number}")  # a path, if the image above all folders has it
            sure -= {bare}
    for name, caption in [(name, caption) for name, caption in entries if rng.random() < 0.1]:
        entries.append((name, caption if rng.random() < 0.5 else "another"))  # a repeated name
        sure -= {name.removeprefix("./")}
    by_path = Counter(name.removeprefix("./") for name, _ in entries)
    sure = {name for name in sure if by_path[name] <= 1 and name not in broken}
    entries.append(("missing.png", "no image"))
    rng.shuffle(entries)

    (root / "._sure.png").write_bytes(b"\0\5\x16\7")
    (root / "._sure.txt").write_bytes(b"\0\5\x16\7")
    (root / "note.heic").write_bytes(b"x")
    file = place / rng.choice(["captions.json", "captions.jsonl"])
    if file.suffix == ".json":
        lines = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(caption)}" for name, caption in entries) + "}"
    else:
        lines = "\n".join(json.dumps({"file": name, "caption": caption}) for name, caption in entries)
    file.write_text(lines, encoding="utf-8")

    report = build_from_folder(root, file, out, per_shard=5)
    items, later = read_all(ShardDataset(report["shards"], 4))
    assert len(items) + later.total() + sum(report["rejects"].values()) == len(names), report
    seen = Counter(item["meta"]["file"] for item in items)
    assert set(seen) <= set(names) - broken and set(seen.values()) == {1}
    assert sure <= set(seen)
    for item in items:
        name = item["meta"]["file"]
        assert number_of(item) == names.index(name) and item["caption"] in own[name], (name, item["caption"], entries)
    assert report["ignored"]["hidden file"] == 2 and report["ignored"][".heic, no image"] == 1
    assert report["ignored"]["entry of the captions file without an image that needs it"] >= 1


@pytest.mark.parametrize("field", ["", "prompt"])
def test_shards(tmp_path, pack, picture, field):
    for case in range(CASES):
        check_shards(tmp_path / f"{case}", random.Random(case), pack, picture, field)


def check_shards(place, rng, pack, picture, field):
    numbers, complete, total = iter(range(256)), {}, 0
    end = "json" if field else "txt"
    for shard in range(rng.randint(1, 3)):
        members, used = [], set()
        for count in range(rng.randint(1, 8)):
            stem = f"{rng.choice(FOLDERS)}{rng.choice(STEMS)}" if count else "sure"
            if stem in used:
                continue
            used.add(stem)
            number, total = next(numbers), total + 1
            extension = rng.choice(["png", "PNG", "webp", "gif", "bmp", "tiff"])
            form = {"tiff": "TIFF"}.get(extension, extension.upper())
            caption, image, kept = f"caption {number}", picture(number, form), {0, 1}
            text = json.dumps({field: caption, "width": 3}).encode() if field else written(rng, caption)
            kind = rng.random() if count else 1.0
            if kind < 0.1:
                image = rng.choice(BAD_IMAGES[1:])
            elif kind < 0.25:
                text = b'{"width": 3}' if field and rng.random() < 0.3 else rng.choice(BAD_TEXTS[1:])
                if field and rng.random() < 0.5:
                    text = json.dumps({field: rng.choice(BAD_CAPTIONS)}).encode()
            elif kind < 0.4 and "." not in stem.rpartition("/")[2]:  # with a dot, it is a member of another sample
                kept = {rng.randint(0, 1)}
            elif "." not in stem.rpartition("/")[2]:
                complete[number] = caption
            pair = [(f"{stem}.{extension}", image), (f"{stem}.{end}", text)]
            members += [pair[i] for i in sorted(kept)]
        members.insert(rng.randint(0, len(members)), ("._sure.png", b"\0\5\x16\7"))
        pack(place / "shards" / f"s-{shard}.tar", members)
    if rng.random() < 0.3:
        pack(place / "shards" / "r-empty.tar", [])
        total += 1
    (place / "shards" / "._s-0.tar").write_bytes(b"\0\5\x16\7")

    from data.shard_patterns import expand

    paths = expand(f"{place / 'shards'}")
    settings = DataSettings(resolution=8, caption_field=field)
    items, rejects = read_all(ShardDataset(paths, 8, **settings.keys))
    assert len(items) + rejects.total() == total, rejects
    assert {number_of(item): item["caption"] for item in items} == complete and len(items) == len(complete)
    if rng.random() < 0.2:
        report = validate(paths, decode=True, settings=settings)
        assert report["samples"] == len(items) and not report["broken"]
        assert sum(report["rejects"].values()) + len(report["empty"]) == rejects.total()
