"""Every kind of odd or broken sample and shard that people have, and its exact outcome: read from a local shard, and streamed.

Each case is a shard with a sample "ok", then what the case is about, then a sample "zz".
"""

import gzip
import io
import os
import pickle
import struct
import tarfile
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from data.captions import LONGEST
from data.errors import DataError
from data.settings import DataSettings
from data.shard_dataset import SampleError, ShardDataset
from data.shard_index import DOTTED, EMPTY
from data.stream_tar import DAMAGED, LINKS, REPEATED, TRAILING
from data.streams import StreamDataset

H, W = 12, 20
pixels = np.zeros((H, W, 3), np.uint8)
pixels[:, : W // 2, 0], pixels[: H // 2, :, 1], pixels[:, :, 2] = 220, 180, 60
RGB = Image.fromarray(pixels)


def encoded(kind: str, image: Image.Image = RGB, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def png_header(width: int, height: int) -> bytes:
    raw = bytearray(encoded("PNG"))
    raw[16:24] = struct.pack(">II", width, height)
    return bytes(raw)


def jpeg_header(width: int, height: int) -> bytes:
    raw = bytearray(encoded("JPEG"))
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(raw)


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes(byte ^ 0xFF for byte in raw[at : at + 8]) + raw[at + 8 :]


class Evil:
    """Its unpickling would leave a file."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


PNG, JPEG, WEBP = encoded("PNG"), encoded("JPEG"), encoded("WEBP")
NO_IMAGE = f"no image (.{', .'.join(DataSettings().image_keys)})"
NO_CAPTION, BROKEN = "no caption (.txt)", "image does not decode"
GOOD = {"png": PNG, "txt": b"c"}


@dataclass
class Case:
    """members: between "ok" and "zz". captions: those read of them. counts: why others are left out. refused: the DataError of
    a local shard. streamed: captions and counts of a stream, if they differ; all: its captions include those of ok and zz."""

    members: list
    captions: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)
    refused: str = ""
    streamed: tuple | None = None
    size: tuple = ()
    damage: object = None
    format: int = tarfile.USTAR_FORMAT
    settings: dict = field(default_factory=dict)


def sample(_key="a", **members) -> list:
    members = GOOD | members
    return [(f"{_key}.{end}", raw) for end, raw in members.items() if raw is not None]


def image(raw: bytes, end="png", size=(H, W)) -> Case:
    return Case(sample(**{"png": None} | {end: raw}), ["c"], size=size)


def bad_image(raw: bytes, end="png", reason=BROKEN) -> Case:
    return Case(sample(**{"png": None} | {end: raw}), counts={reason: 1})


def text(raw: bytes, caption: str = "", reason: str = "") -> Case:
    return Case(sample(txt=raw), [caption] if caption else [], {reason: 1} if reason else {})


def meta(raw: bytes, reason: str = "") -> Case:
    return Case(sample(json=raw), [] if reason else ["c"], {reason: 1} if reason else {})


def in_json(value: str, caption="", reason="") -> Case:
    members = sample(txt=None, json=b'{"prompt": %s}' % value.encode())
    counts = {reason: 1} if reason else {}
    return Case(members, [caption] if caption else [], counts, settings={"caption_field": "prompt"})


def link(kind: bytes):
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "ok.png"
        archive.addfile(info)

    return add


def header_at(raw: bytes, name: bytes) -> int:
    return raw.index(name + b"\0")


def claims(raw: bytes, name: bytes, size: int) -> bytes:
    """The tar with another size in a member's header, and the checksum that belongs to it."""
    at = header_at(raw, name)
    header = bytearray(raw[at : at + 512])
    header[124:136] = b"\x80" + size.to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return raw[:at] + bytes(header) + raw[at + 512 :]


def damage(change, captions=("ok",), reason=DAMAGED, refused="truncated|corrupt", members=None) -> Case:
    streamed = list(captions), {reason: 1}
    return Case(sample() if members is None else members, refused=refused, streamed=streamed, damage=change)


BIG = b" " * (1 << 24)
exif_order = rotated()
more = [RGB.transpose(0), RGB.transpose(1)]
grey16 = Image.fromarray((np.arange(H * W, dtype=np.uint16) * 200).reshape(H, W))
CASES = {
    "CMYK JPEG": image(encoded("JPEG", RGB.convert("CMYK")), "jpg"),
    "grey JPEG": image(encoded("JPEG", RGB.convert("L")), "jpg"),
    "grey PNG": image(encoded("PNG", RGB.convert("L"))),
    "16-bit PNG": image(encoded("PNG", grey16)),
    "palette PNG": image(encoded("PNG", RGB.convert("P"))),
    "1-bit PNG": image(encoded("PNG", RGB.convert("1"))),
    "PNG with opacity": image(encoded("PNG", RGB.convert("RGBA"))),
    "grey PNG with opacity": image(encoded("PNG", RGB.convert("LA"))),
    "PNG with a transparent colour": image(encoded("PNG", transparency=(0, 0, 60))),
    "rotated by EXIF": image(exif_order, "jpg", (W, H)),
    "progressive JPEG": image(encoded("JPEG", progressive=True), "jpg"),
    "animated GIF": image(encoded("GIF", save_all=True, append_images=more), "gif"),
    "animated WebP": image(encoded("WEBP", save_all=True, append_images=more), "webp"),
    "BMP": image(encoded("BMP"), "bmp"),
    "TIFF": image(encoded("TIFF"), "tif"),
    "one pixel": image(encoded("PNG", Image.new("RGB", (1, 1))), size=(1, 1)),
    "one line of 6000": image(encoded("PNG", Image.new("RGB", (6000, 1))), size=(1, 6000)),
    "JPEG named .png": image(JPEG),
    "upper-case extension": Case([("a.PNG", PNG), ("a.TXT", b"c")], ["c"]),
    "zero bytes": bad_image(b"", reason=NO_IMAGE),
    "no image": Case(sample(png=None), counts={NO_IMAGE: 1}),
    "a web page": bad_image(b"<html>404 not found</html>", "jpg"),
    "noise": bad_image(os.urandom(500), "webp"),
    "truncated JPEG": bad_image(JPEG[: len(JPEG) // 2], "jpg"),
    "truncated PNG": bad_image(PNG[: len(PNG) // 2]),
    "truncated WebP": bad_image(WEBP[: len(WEBP) // 2], "webp"),
    "damaged PNG": bad_image(flipped(PNG, PNG.index(b"IDAT") + 6)),
    "header alone": bad_image(b"GIF89a", "gif"),
    "32 bits per value": bad_image(encoded("TIFF", RGB.convert("F")), "tif"),
    "PNG bomb": bad_image(png_header(60000, 60000), reason="image is too large"),
    "JPEG bomb": bad_image(jpeg_header(65500, 65500), "jpg", "image is too large"),
    "no caption": Case(sample(txt=None), counts={NO_CAPTION: 1}),
    "caption of zero bytes": Case(sample(txt=b""), counts={NO_CAPTION: 1}),
    "blank caption": text(b" \r\n\t", reason="empty caption"),
    "byte order mark": text(b"\xef\xbb\xbfa red square\r\n", "a red square"),
    "byte order mark alone": text(b"\xef\xbb\xbf", reason="empty caption"),
    "Latin-1 caption": text("café".encode("latin-1"), reason="caption is not UTF-8"),
    "UTF-16 caption": text("café".encode("utf-16"), reason="caption is not UTF-8"),
    "NUL in the caption": text(b"a\0b", reason="caption has a NUL character"),
    "endless caption": text(b"a" * (LONGEST + 1), reason=f"caption of more than {LONGEST:,} characters"),
    "caption of many MB": text(b"a" * (1 << 23), reason="caption of more than 4 MiB"),
    "caption in the json": in_json('" a cat "', "a cat"),
    "caption null": in_json("null", reason="caption is null, not text"),
    "caption a list": in_json('["a"]', reason="caption is a list, not text"),
    "caption half a surrogate pair": in_json(r'"\ud800"', reason="caption has half a surrogate pair"),
    "broken json": meta(b'{"a": 1', "json does not parse"),
    "deep json": meta(b"[" * 100_000, "json does not parse"),
    "json that is a list": meta(b"[1]", "json is not an object"),
    "json with a byte order mark": meta(b'\xef\xbb\xbf{"a": 1}'),
    "json of many MB": meta(b"{}" + BIG, "meta of more than 16 MiB"),
    "dots in the name": Case([*sample("cat"), *sample("cat.v2")], ["c"], {DOTTED: 1}),
    "only dotted names": Case(sample("cat.v2"), [], {DOTTED: 1}),
    "./ before the name": Case(sample("./a"), ["c"]),
    "in folders": Case([*sample("x/a"), *sample("y/a", txt=b"d")], ["c", "d"]),
    "a dot in a folder's name": Case(sample("x.y/a"), ["c"]),
    "names that leave the folder": Case([*sample("../../a"), *sample("/etc/b", txt=b"d")], ["c", "d"]),
    "names like a command": Case(sample("pipe:touch piped;"), ["c"]),
    "macOS files": Case([("._a.png", b"\0\5\26\7"), ("._a.txt", b"\0\5\26\7"), (".DS_Store", b"x"), *sample()], ["c"]),
    "files without extension": Case([("README", b"x"), *sample()], ["c"]),
    "pickles and code": Case(
        sample(pyd=pickle.dumps(Evil()), pth=pickle.dumps(Evil()), pickle=pickle.dumps(Evil()), py=b"boom"), ["c"]
    ),
    "long names (GNU)": Case(sample("a" * 300), ["c"], format=tarfile.GNU_FORMAT),
    "long names (PAX)": Case(sample("é" * 200), ["c"], format=tarfile.PAX_FORMAT),
    "directories and devices": Case([(tarfile.DIRTYPE, "d"), (tarfile.FIFOTYPE, "f.png"), *sample("d/a")], ["c"]),
    "images first, captions later": Case(
        [("a.png", PNG), ("b.png", PNG), ("a.txt", b"c"), ("b.txt", b"d")],
        ["c", "d"],
        streamed=(["ok", "zz"], {NO_CAPTION: 2, NO_IMAGE: 2}),
    ),
    "a key twice": Case(
        [*sample(), *sample("b"), *sample(txt=b"d")],
        refused="key a has two .png members",
        streamed=(["ok", "c", "c", "d", "zz"], {}),
    ),
    "a member twice": Case(
        [*sample(), ("a.txt", b"d")], refused="key a has two .txt members", streamed=(["ok", "zz"], {REPEATED: 1})
    ),
    "symbolic link": Case(
        [link(tarfile.SYMTYPE)], refused="is a link", streamed=([], {LINKS: 1})
    ),  # "ok" may have more members
    "hard link": Case([link(tarfile.LNKTYPE)], refused="is a link", streamed=([], {LINKS: 1})),
    "empty tar": Case([], counts={EMPTY: 1}, streamed=([], {}), damage=lambda raw: b"\0" * 10240),
    "tar of zero bytes": Case([], counts={EMPTY: 1}, streamed=([], {EMPTY: 1}), damage=lambda raw: b""),
    "truncated inside an image": damage(lambda raw: raw[: header_at(raw, b"a.png") + 512 + 40]),
    "truncated between image and caption": damage(lambda raw: raw[: header_at(raw, b"a.txt")]),
    "truncated inside a header": damage(lambda raw: raw[: header_at(raw, b"a.txt") + 100]),
    "truncated after a sample": damage(lambda raw: raw[: header_at(raw, b"zz.png")]),
    "no end mark": damage(lambda raw: raw[: header_at(raw, b"zz.txt") + 1024], ("ok", "c")),
    "damaged header": damage(lambda raw: flipped(raw, header_at(raw, b"a.txt"))),
    "zeros in the middle": damage(
        lambda raw: raw[: (at := header_at(raw, b"a.png"))] + b"\0" * 512 + raw[at + 512 :], reason=TRAILING
    ),
    "two tars in one file": damage(lambda raw: raw + raw, ("ok", "c", "zz"), TRAILING),
    "compressed": damage(gzip.compress, (), refused="uncompressed tar"),
    "a web page for a tar": damage(lambda raw: b"<html>404</html>" * 99, (), refused="uncompressed tar"),
    "a member of a petabyte": damage(lambda raw: claims(raw, b"a.png", 1 << 50)),
    "a name of a petabyte": damage(
        lambda raw: claims(raw, b"././@LongLink", 1 << 50), (), refused="a name of", members=sample("a" * 300)
    ),
}
CASES["a name of a petabyte"].format = tarfile.GNU_FORMAT


def build(case: Case, folder) -> list:
    """The case's shard, and one with a sample "tail" after it."""
    file, tail = folder / "case.tar", folder / "tail.tar"
    with tarfile.open(file, "w", format=case.format) as archive:
        for member in [*sample("ok", txt=b"ok"), *case.members, *sample("zz", txt=b"zz")]:
            if callable(member):
                member(archive)
                continue
            name, raw = member
            info = tarfile.TarInfo(name)
            if isinstance(name, bytes):  # a type of member
                info = tarfile.TarInfo(raw)
                info.type, raw = name, b""
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    if case.damage:
        file.write_bytes(case.damage(file.read_bytes()))
    with tarfile.open(tail, "w") as archive:
        for name, raw in sample("tail", txt=b"tail", json=b'{"prompt": "tail"}'):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return [file, tail]


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path, monkeypatch):
    """No case unpickles, runs or writes anything."""
    monkeypatch.chdir(tmp_path)
    yield
    assert {file.name for file in tmp_path.iterdir()} <= {
        "case.tar", "tail.tar", "case.tar.index.npz", "tail.tar.index.npz"
    }  # fmt: skip


def outcome(case: Case) -> tuple[list, dict]:
    """What a shard gives if it is not refused; samples without captions in the json are no samples of such a shard."""
    if case.settings:
        return case.captions, case.counts | {"no caption (.json)": 2}
    ends = [] if case.damage else ["ok"], [] if case.damage else ["zz"]
    return [*ends[0], *case.captions, *ends[1]], case.counts


@pytest.mark.parametrize("name", CASES)
def test_local(name, tmp_path):
    case, paths = CASES[name], build(CASES[name], tmp_path)
    data = DataSettings(resolution=8, **case.settings)
    if case.refused:
        with pytest.raises(DataError, match=case.refused):
            ShardDataset(paths, 8, **data.keys)
        return
    captions, counts = outcome(case)
    dataset = ShardDataset(paths, 8, **data.keys)
    found, rejected, sizes = [], Counter(dataset.rejected), {}
    for row in range(len(dataset)):
        try:
            read = dataset.read(row)
        except SampleError as reason:
            rejected[str(reason)] += 1
        else:
            found.append(read["caption"])
            sizes[read["caption"]] = read["original_size"]
    dataset.close()
    assert (found, dict(rejected)) == ([*captions, "tail"], counts)
    assert not case.size or sizes["c"] == case.size


@pytest.mark.parametrize("name", CASES)
def test_streamed(name, tmp_path):
    case, paths = CASES[name], build(CASES[name], tmp_path)
    captions, counts = case.streamed or outcome(case)
    data = DataSettings(resolution=8, retry_seconds=0, **case.settings)
    dataset = StreamDataset([[str(path) for path in paths]], ("image", "caption", "meta"), 0, data)
    samples = list(dataset.usable(dataset.raw_samples({"url": str(path)} for path in paths)))
    skipped = sum((Counter(sample["skipped"]) for sample in samples), Counter())
    assert ([sample["caption"] for sample in samples], dict(skipped)) == ([*captions, "tail"], counts)
    assert not case.size or case.size in [sample["original_size"] for sample in samples]


def test_there_are_many_kinds():
    assert len(CASES) >= 80
