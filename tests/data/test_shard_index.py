"""An incomplete tar is an error: no sample is lost silently."""

import os
import threading

import numpy as np
import pytest

from data import shard_index as index_module
from data.errors import DataError
from data.shard_index import DOTTED, EMPTY, build_index, index_file, load_index, save_index, usable_rows


def member_bytes(tar, name):
    """Offset of a member's header."""
    return tar.read_bytes().find(name.encode())


def test_offsets_lead_to_the_bytes(shards):
    tar = shards(5, change={3: {"json": None}})[0]
    index, raw = build_index(tar), tar.read_bytes()
    assert index.keys.tolist() == [b"k%04d" % i for i in range(5)]
    assert index.extensions == ["json", "png", "txt"]
    offset, size = index.locate(["txt"])
    assert [raw[o : o + s] for o, s in zip(offset, size, strict=True)] == [b"c%d" % i for i in range(5)]
    assert index.offset[3, 0] == index.size[3, 0] == -1
    assert index.offset.dtype == index.size.dtype == np.int64


def test_long_names_folders_dots_and_other_files(tmp_path, pack):
    long = "d" * 90 + "/" + "k" * 90
    members = [
        ("README", b"x"),
        (".hidden.txt", b"x"),
        ("a.b/k.seg.png", b"x"),
        ("a.b/k.TXT", b"y"),
        (f"{long}.txt", b"z"),
    ]
    index = build_index(pack(tmp_path / "t.tar", members))
    assert index.keys.tolist() == [b"a.b/k", long.encode()]
    assert index.extensions == ["seg.png", "txt"]


def test_truncated_inside_a_member(shards):
    tar = shards(10)[0]
    cut = member_bytes(tar, "k0007.png") + 520
    os.truncate(tar, cut)
    with pytest.raises(DataError, match=rf"{tar}: truncated at byte {cut}, inside member k0007.png; .*k0006.json"):
        load_index(tar)
    assert not index_file(tar).exists()


def test_truncated_between_members(shards):
    tar = shards(10)[0]
    os.truncate(tar, member_bytes(tar, "k0007.png"))
    with pytest.raises(DataError, match="truncated .* without its end mark; the last complete member is k0006.json"):
        load_index(tar)


@pytest.mark.parametrize("damage", [b"\xff", b"\0"])  # zeros (a hole in a copy) look like the end of a tar
def test_corrupt_header(shards, damage):
    tar = shards(10)[0]
    raw = bytearray(tar.read_bytes())
    at = member_bytes(tar, "k0004.png")
    raw[at : at + 512] = damage * 512
    tar.write_bytes(raw)
    with pytest.raises(DataError, match=f"corrupt header at byte {at}; the last complete member is k0003.json"):
        load_index(tar)


def test_not_a_tar(tmp_path):
    (tmp_path / "text.tar").write_bytes(b"hello" * 500)
    with pytest.raises(DataError, match="text.tar"):
        load_index(tmp_path / "text.tar")
    with pytest.raises(DataError, match="none.tar"):
        load_index(tmp_path / "none.tar")


@pytest.mark.parametrize("again", ["k.png", "k.PNG"])
def test_duplicate_key(tmp_path, pack, again):
    tar = pack(tmp_path / "t.tar", [("k.png", b"x"), ("k.txt", b"y"), (again, b"z")])
    with pytest.raises(DataError, match="key k has two .png members"):
        build_index(tar)


@pytest.mark.parametrize("raw", [b"", b"\0" * 10240])
def test_an_empty_tar_has_no_samples(tmp_path, raw):
    (tmp_path / "empty.tar").write_bytes(raw)
    index = load_index(tmp_path / "empty.tar")
    rows, rejects = usable_rows(index, {"caption": ["txt"]})
    assert len(index) == len(rows) == 0 and rejects == {EMPTY: 1}


def test_samples_behind_dots_are_counted(tmp_path, pack):
    """cat.v2 is a sample of its own, which WebDataset's key hides; a mask without a caption is none."""
    names = ["cat.png", "cat.txt", "cat.v2.png", "cat.v2.txt", "cat.mask.png", "dog.a.png", "dog.a.txt", "owl.txt"]
    index = load_index(pack(tmp_path / "t.tar", [(name, b"x") for name in names]))
    rows, rejects = usable_rows(index, {"image": ["png"], "caption": ["txt"]}, (["png"], ["txt"]))
    assert rows.tolist() == [0] and rejects == {DOTTED: 2, "no image (.png)": 1}
    assert usable_rows(index, {"caption": ["txt"]}, (["png"], ["txt"]))[1] == {DOTTED: 2}
    only = load_index(pack(tmp_path / "u.tar", [(name, b"x") for name in names[2:4] + names[5:7]]))
    with pytest.raises(DataError, match="none of its 2 samples is usable: 2 have dot in the name"):
        usable_rows(only, {"caption": ["txt"]}, (["png"], ["txt"]))


def test_links_are_refused(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        link = tarfile.TarInfo("k.png")
        link.type, link.linkname = tarfile.LNKTYPE, "j.png"
        archive.addfile(link)
    with pytest.raises(DataError, match="k.png is a link"):
        build_index(tmp_path / "t.tar")


def test_rejects_are_counted(shards):
    index = build_index(shards(10, change={1: {"txt": None}, 2: {"txt": b""}, 3: {"png": None}})[0])
    rows, rejects = usable_rows(index, {"caption": ["txt"], "image": ["jpg", "png"]})
    assert rows.tolist() == [0, 4, 5, 6, 7, 8, 9]
    assert rejects == {"no caption (.txt)": 2, "no image (.jpg, .png)": 1}
    rows, rejects = usable_rows(index, {"caption": ["txt"]})
    assert len(rows) == 8 and rejects.total() == 2


def test_all_rejected_is_an_error(shards):
    tar = shards(10, change={i: {"txt": None} for i in range(10)})[0]
    with pytest.raises(DataError, match=rf"{tar}: none of its 10 samples .* 10 have no caption \(.txt\)"):
        usable_rows(load_index(tar), {"caption": ["txt"], "image": ["png"]})


def test_saved_index_is_used_and_a_stale_one_rebuilt(shards, monkeypatch):
    tar = shards(10)[0]
    load_index(tar)
    walks = []
    real = index_module.members
    monkeypatch.setattr(index_module, "members", lambda t: walks.append(t) or real(t))
    assert len(load_index(tar)) == 10 and not walks
    shards(6)  # writes the same file anew
    assert len(load_index(tar)) == 6 and len(walks) == 1
    os.utime(tar, ns=(0, 1))  # the same size, another time
    load_index(tar)
    assert len(walks) == 2
    index_file(tar).write_bytes(index_file(tar).read_bytes()[:200])
    assert len(load_index(tar)) == 6 and len(walks) == 3


def test_read_only_folder(shards, monkeypatch):
    tar = shards(10)[0]

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)  # permissions would not stop root
    assert len(load_index(tar)) == 10
    assert sorted(p.name for p in tar.parent.iterdir()) == [tar.name]


def test_many_writers_at_once(shards):
    tar = shards(10)[0]
    index = build_index(tar)
    threads = [threading.Thread(target=save_index, args=(index,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.name for p in tar.parent.iterdir()) == [tar.name, index_file(tar).name]
    assert np.array_equal(load_index(tar).offset, index.offset)
