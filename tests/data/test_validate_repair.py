"""`--validate`'s table and `--repair`'s clean copies."""

import pytest
import support
from PIL import Image

from data.errors import DataError
from data.repair import SAME_KEY, repair
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.stream_tar import DAMAGED
from data.validate import image_size, validate

SETTINGS = DataSettings(resolution=8)


def call(*arguments):
    return support.call("shards", *map(str, arguments))


def test_the_table(shards, encode, pipelines):
    change = {
        0: {"png": encode(size=(300, 600))},
        1: {"png": encode(size=(900, 500))},
        2: {"txt": b" "},
        3: {"png": b"x"},
    }
    change |= {4: {"txt": b"word " * 30}}
    tars = shards(20, 5, change=change)
    done = call(
        "--validate", tars[0].parent, "--processes", 2, "--decode", "--resolution", 8, "--pipeline", pipelines["sdxl"]
    )
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0].startswith("4 shards, 18 usable samples, ")
    assert lines[1:-1] == [
        "rejected, by reason:", "1 empty caption", "1 image does not decode",
        "short side in pixels:", "16 0 to 255", "2 256 to 511", 
        "width : height:", "1 below 1:2", "16 3:4 to 4:3", "1 4:3 to 2:1",
    ]  # fmt: skip
    assert (
        lines[-1]
        == "captions in tokens: 50% up to 5, 95% up to 32, 100% up to 32; 1 exceed the encoders' 16 and are cut"
    )


def test_processes_change_nothing(shards):
    tars = shards(20, 5, change={7: {"txt": None}})
    assert validate(tars, True, SETTINGS, processes=2) == validate(tars, True, SETTINGS)


def test_sizes_as_shown(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image_size(encode(size=(30, 20), form="JPEG", exif=exif)) == (30, 20)
    assert image_size(encode(size=(30, 20))) == (20, 30) and image_size(b"x") is None


def test_exit_codes(shards):
    tars = shards(10, 5, change={i: {"txt": b" "} for i in range(6)})
    done = call("--validate", tars[0].parent)
    assert done.returncode == 2 and "6 of 10 samples are unusable" in done.stderr
    tars[1].write_bytes(tars[1].read_bytes()[:5000])
    done = call("--validate", tars[0].parent)
    assert done.returncode == 2 and "truncated" in done.stderr
    assert call("--repair", tars[0].parent).returncode == 2


def test_repair(shards, tmp_path):
    tars = shards(20, 5, change={1: {"png": b"x"}, 2: {"txt": None}})
    originals = [tar.read_bytes() for tar in tars]
    raw = tars[2].read_bytes()
    tars[2].write_bytes(raw[: raw.index(b"k0013.txt")])  # truncated inside sample 13
    damaged = tars[2].read_bytes()
    done = call("--validate", tars[0].parent, "--repair", tmp_path / "out", "--resolution", 8, "--processes", 2)
    assert done.returncode == 0, done.stderr
    copies = [tmp_path / "out" / tar.name for tar in tars]
    dataset = ShardDataset(copies, 8)
    keys = sorted(dataset[i]["key"] for i in range(len(dataset)))
    assert keys == [f"k{i:04d}" for i in range(20) if i not in (1, 2, 13, 14)]
    for position in range(len(dataset)):
        item = dataset[position]
        assert item["caption"] == f"c{item['meta']['row']}" and item["key"].endswith(f"{item['meta']['row']:02d}")
    assert "3 samples; left out: 1 x no caption (.txt), 1 x image does not decode" in done.stdout
    assert f"1 x {DAMAGED}" in done.stdout and "5 samples; left out: none" in done.stdout
    assert tars[2].read_bytes() == damaged and tars[0].read_bytes() == originals[0]
    times = [copy.stat().st_mtime_ns for copy in copies]
    copies[1].unlink()
    again = repair(tars, tmp_path / "out", SETTINGS)
    assert [copy.stat().st_mtime_ns for copy in copies if copy != copies[1]] == times[:1] + times[2:]
    assert again[tars[1]] == (5, "") and again[tars[0]] == (3, "copied before")


def test_a_repeated_key_keeps_its_first_sample(tmp_path, pack, encode):
    members = [("a.png", encode((9, 0, 0))), ("a.txt", b"c9"), ("b.png", encode()), ("b.txt", b"b")]
    tar = pack(tmp_path / "in" / "s.tar", [*members, ("a.png", encode((7, 0, 0))), ("a.txt", b"c7")])
    count, left_out = repair([tar], tmp_path / "out", SETTINGS)[tar]
    assert count == 2 and f"1 x {SAME_KEY}" in left_out
    dataset = ShardDataset([tmp_path / "out" / "s.tar"], 8)
    assert {dataset[i]["caption"] for i in range(2)} == {"c9", "b"}


def test_what_is_refused(shards, tmp_path):
    one, other = shards(4, folder="a")[0], shards(4, folder="b")[0]
    with pytest.raises(DataError, match="two shards are named"):
        repair([one, other], tmp_path / "out", SETTINGS)
    with pytest.raises(DataError, match="never written in place"):
        repair([one], one.parent, SETTINGS)
