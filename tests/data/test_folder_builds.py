"""Shards from a folder: captions in tables, several processes, progress, and builds that are killed and run again."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.processes
from data.errors import DataError
from data.image_folder import build_from_folder
from data.shard_dataset import ShardDataset

CAPTIONS = {"a.png": "ä red", "sub/b.png": 'say "hi", twice', "c.png": "by bare name"}


@pytest.fixture
def pictures(tmp_path, encode):
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "sub/b.png", "sub/c.png", "sub/none.png"]):
        (root / name).write_bytes(encode((i * 50, 0, 0)))
    return root


def tars(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.tar"))}


def write_table(file, columns):
    rows = list(zip(*columns.values(), strict=True))
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    elif file.suffix == ".tsv":
        file.write_text("\n".join("\t".join(map(str, row)) for row in [list(columns), *rows]), encoding="utf-8-sig")
    else:
        with file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([list(columns), *rows])


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    "names", [("file", "caption"), ("Path", "Text"), ("image", "prompt"), ("file_name", "caption")]
)
def test_captions_in_a_table(tmp_path, pictures, form, names):
    file = tmp_path / f"captions.{form}"
    captions = {f"./{name}" if name == "a.png" else name: caption for name, caption in CAPTIONS.items()}
    columns = {"number": [1, 2, 3], names[1]: list(captions.values()), names[0]: list(captions)}
    write_table(file, columns)
    report = build_from_folder(pictures, file, tmp_path / "out")
    dataset = ShardDataset(report["shards"], 8)
    found = {item["meta"]["file"]: item["caption"] for item in map(dataset.__getitem__, range(len(dataset)))}
    assert found == {"a.png": "ä red", "sub/b.png": 'say "hi", twice', "sub/c.png": "by bare name"}
    assert report["rejects"] == {"no caption": 1} and not report["ignored"]


def test_which_columns_were_looked_for(tmp_path, pictures):
    file = tmp_path / "captions.parquet"
    write_table(file, {"image": [{"bytes": b"x"}], "caption": ["y"]})  # images themselves are no names
    with pytest.raises(DataError, match="looked for one of file, path, image, file_name, filename among caption"):
        build_from_folder(pictures, file, tmp_path / "out")
    write_table(tmp_path / "captions.csv", {"url": ["a.png"], "alt": ["y"]})
    with pytest.raises(DataError, match="file, .* and one of caption, text, prompt among url, alt: rename the columns"):
        build_from_folder(pictures, tmp_path / "captions.csv", tmp_path / "out")


@pytest.fixture
def many(tmp_path, encode):
    """Images with some that are left out, and their captions file."""
    root, image = tmp_path / "many", encode()
    root.mkdir()
    for i in range(1500):
        (root / f"{i}.png").write_bytes(b"" if i % 97 == 0 else image)
    (root / "89.txt").write_bytes(b"\xff\xfe")
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(json.dumps({"file": f"{i}.png", "caption": f"c{i}"}) for i in range(1500) if i % 89))
    return root, file


def test_processes_change_nothing(tmp_path, many):
    one = build_from_folder(*many, tmp_path / "one", 20)
    three = build_from_folder(*many, tmp_path / "three", 20, processes=3)
    assert tars(tmp_path / "one") == tars(tmp_path / "three") and len(one["shards"]) == 74
    for key in ("samples", "rejects", "ignored"):
        assert one[key] == three[key]
    assert one["samples"] == 1468 and one["rejects"] == {
        "no caption": 16,
        "caption is not UTF-8": 1,
        "empty image file": 15,
    }


def test_a_killed_build_goes_on(tmp_path, many):
    whole, out = build_from_folder(*many, tmp_path / "whole", 10), tmp_path / "out"
    flags = ["--images", many[0], "--captions", many[1], "--out", out, "--per-shard", 10, "--processes", 3]
    command = [sys.executable, "-m", "trainer.shards", *map(str, flags)]
    build = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("*.tar"))) >= 5)
    workers = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
    build.kill()
    build.wait()
    assert len(workers) == 3
    wait_for(lambda: not any(running(pid) for pid in workers))  # they would write what the second attempt writes
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert 5 <= len(before) < len(whole["shards"])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"1468 samples in 147 shards ({len(before)} of them from before)" in done.stdout
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert tars(out) == tars(tmp_path / "whole") and not list(out.glob("*.tmp"))
    assert len(ShardDataset(sorted(out.glob("*.tar")), 8)) == 1468


def running(pid):
    """Whether a process is there and not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_complete_shards_are_kept(tmp_path, many):
    out = tmp_path / "out"
    build_from_folder(*many, out, 100)
    before = tars(out)
    (out / "images-000003.tar").unlink()
    (out / "images-000003.tar.tmp").write_bytes(b"half")
    (out / "images-000004.tar.index.npz").unlink()
    again = build_from_folder(*many, out, 100)
    assert again["kept"] == 14 and again["samples"] == 1468 and tars(out) == before
    assert not (out / "images-000003.tar.tmp").exists() and (out / "images-000004.tar.index.npz").exists()


@pytest.mark.parametrize("change", ["caption", "image", "new image", "per shard", "fewer"])
def test_shards_of_other_images_are_refused(tmp_path, pictures, encode, change):
    for name in ("a", "sub/b", "sub/c"):
        (pictures / f"{name}.txt").write_text(f"a {name}")
    out, per_shard = tmp_path / "out", 1
    build_from_folder(pictures, None, out, per_shard)
    before = tars(out)
    if change == "caption":
        (pictures / "sub" / "c.txt").write_text("a sub/d")
    elif change == "image":
        (pictures / "a.png").write_bytes(encode(size=(9, 30)))
    elif change == "new image":
        (pictures / "aa.png").write_bytes(encode())
        (pictures / "aa.txt").write_text("new")
    elif change == "per shard":
        per_shard = 2
    else:
        (pictures / "sub" / "c.txt").unlink()
    with pytest.raises(DataError, match=r"already holds images-\d+.tar with other images or captions"):
        build_from_folder(pictures, None, out, per_shard)
    assert tars(out) == before


def test_progress(tmp_path, many, monkeypatch):
    monkeypatch.setattr(data.processes, "PROGRESS_SECONDS", 0.0)
    lines = []
    build_from_folder(*many, tmp_path / "out", 500, processes=2, say=lines.append)
    assert lines[0].startswith("checking images: 256 of 1500, ") and lines[-1].startswith(
        "writing shards: 1468 of 1468, "
    )
    assert "per second" in lines[0] and lines[-1].endswith("0 s left")
