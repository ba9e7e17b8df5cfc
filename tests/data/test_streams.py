"""Streams from real servers: the samples, their order, and servers that are killed in the middle."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice

import pytest
import torch
from servers import Server

from data.errors import DataError
from data.loader import Batches
from data.rejects import RETRIED
from data.remote_files import CannotRead, open_url, s3_client
from data.sampling_order import BatchSplit
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand_braces
from data.sources import open_batches, open_dataset
from data.streams import DEAD_SHARDS, OTHER_ENCODING, UNREADABLE, StreamBatches, StreamDataset

KINDS = ("http", "ranges", "s3")
WANT = ("image", "caption", "meta")


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    s3_client.cache_clear()  # another server


@pytest.fixture
def server(tmp_path, shards, monkeypatch):
    """Starts a server of 40 samples in four shards."""
    started = []

    def start(kind: str, **change) -> Server:
        shards(40, 10, **change)
        found = Server(kind, tmp_path / "shards")
        started.append(found)
        found.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", found.address)
        return found

    yield start
    for each in started:
        each.kill()


def stream(*urls, want=WANT, **values) -> StreamDataset:
    values = {"resolution": 8, "shuffle_buffer": 8, "retry_seconds": 20.0} | values
    return open_dataset(DataSettings(train=list(urls), **values), "train", want, 3)


def read(dataset, n, rank=0, start=0, workers=0, world=2) -> list:
    batches = open_batches(dataset, BatchSplit(world, 4), rank, start, workers)
    found = list(islice(batches, n))
    batches.close()
    return found


def captions(batches) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def nearly_all(batches, n) -> bool:
    """Shards are drawn with replacement: some samples come late."""
    found = set(captions(batches))
    return found <= {f"c{i}" for i in range(n)} and len(found) > 0.7 * n


def check_pairs(batches) -> None:
    """The caption, the colour and the .json of every sample are of one number."""
    for batch in batches:
        for caption, image, meta in zip(batch.captions, batch.images, batch.meta, strict=True):
            number = int(caption[1:])
            assert meta == {"row": number}
            assert torch.equal(image[:, 3, 3], torch.tensor([number / 127.5 - 1, -1, -1]))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_their_order(server, kind):
    url = server(kind).url("s-{000000,000010,000020,000030}.tar")
    found = read(stream(url), 25)
    check_pairs(found)
    assert nearly_all(found, 40)
    assert captions(read(stream(url), 25)) == captions(found)  # of seed, rank, start and processes alone
    assert captions(read(stream(url), 25, rank=1)) != captions(found)
    assert captions(read(stream(url), 25, start=7)) != captions(found)
    both = [captions(read(stream(url), 12, workers=2)) for _ in range(2)]
    assert both[0] == both[1] and set(both[0]) <= {f"c{i}" for i in range(40)}
    assert found[3].index == [0, 1, 2, 3] and found[3].images.shape == (4, 3, 8, 8)
    first = stream(url)
    assert [first[i]["caption"] for i in (0, 1, 39, 40)] == ["c0", "c1", "c39", "c0"]  # in the shards' order


@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_the_middle_and_started_again(server, kind, monkeypatch):
    """Noise makes the shards long enough for a connection to break inside one."""
    noise = {i: {"bin": os.urandom(300_000)} for i in range(40)}
    running = server(kind, change=noise)
    url = running.url("s-{000000,000010,000020,000030}.tar")
    wanted = captions(read(stream(url), 30))
    batches = StreamBatches(stream(url), BatchSplit(2, 4), 0)
    found = list(islice(batches, 6))
    running.kill()
    threading.Thread(target=lambda: (time.sleep(1), running.start())).start()
    found += list(islice(batches, 24))
    check_pairs(found)
    assert captions(found) == wanted
    counts = sum((Counter(batch.skipped) for batch in found), Counter())
    assert counts.keys() == {RETRIED} and counts[RETRIED] >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stays_away_ends_training_with_one_line(server, kind, monkeypatch):
    running = server(kind)
    dataset = stream(running.url("s-000000.tar"), retry_seconds=0.3)
    batches = StreamBatches(dataset, BatchSplit(1, 4), 0)
    next(batches)
    running.kill()
    with pytest.raises(
        DataError, match=rf"{DEAD_SHARDS} shards in a row gave no sample, the last one .*check the address"
    ):
        list(islice(batches, 100))
    with pytest.raises(DataError, match="no sample can be read"):
        stream(running.url("s-000000.tar"), retry_seconds=0.3)


def test_missing_shards_are_left_out_and_counted(server):
    url = server("ranges").url("s-{000000,000001,000010}.tar")  # the second one does not exist
    found = read(stream(url, retry_seconds=60), 60)  # what does not exist is not tried again
    counts = sum((Counter(batch.skipped) for batch in found), Counter())
    assert counts.keys() == {UNREADABLE} and nearly_all(found, 20)


def test_a_file_that_changes_while_it_is_read(server, tmp_path):
    running = server("ranges", change={0: {"bin": os.urandom(8_000_000)}})
    file = open_url(running.url("s-000000.tar"), 10)
    file.read(4096)
    running.kill()
    (tmp_path / "shards" / "s-000000.tar").write_bytes(os.urandom(9_000_000))
    running.start()
    with pytest.raises(CannotRead, match="changed while it was read"):
        while file.read(1 << 16):
            pass
    file.close()


def test_s3_patterns(server):
    server("s3")
    for pattern in (
        "s3://shards/train/*.tar",
        "s3://shards/train/",
        "s3://shards/train/s-0000?0.tar".replace("?", "*"),
    ):
        assert nearly_all(read(stream(pattern), 30), 40)
    with pytest.raises(DataError, match="no shard matches s3://shards/other/\\*.tar"):
        stream("s3://shards/other/*.tar")
    with pytest.raises(DataError, match="s3://nothing/.* cannot be listed"):
        stream("s3://nothing/*.tar")
    with pytest.raises(DataError, match="cannot be listed: name its shards with braces"):
        stream("http://127.0.0.1:1/*.tar")


def test_pipes(shards):
    tars = shards(20, 10)
    folder = tars[0].parent
    found = read(stream(f"pipe:cat {folder}/s-{{000000,000010}}.tar"), 20)
    check_pairs(found)
    assert nearly_all(found, 20)
    half = f"pipe:head -c 6000 {tars[0]}; exit 3"  # a command that fails in the middle
    found = read(stream(half, str(tars[1])), 20)
    check_pairs(found)
    counts = sum((Counter(batch.skipped) for batch in found), Counter())
    assert counts.keys() <= {UNREADABLE, "truncated or damaged shard"} and counts
    assert "c9" not in captions(found) and "c12" in captions(found)


def test_weights(shards):
    one, other = shards(10, folder="one"), shards(10, change={i: {"txt": b"x"} for i in range(10)}, folder="other")
    for first in (str(one[0]), f"pipe:cat {one[0]}"):  # exact and streamed
        dataset = stream(first, str(other[0]), weights=[3, 1])
        found = captions(read(dataset, 250, world=1))
        assert 240 <= found.count("x") <= 260
        assert isinstance(dataset, StreamDataset) == first.startswith("pipe:")
    exact = stream(str(one[0]), str(other[0]), weights=[3, 1])
    assert captions(read(exact, 10, start=5, world=1)) == captions(read(exact, 15, world=1))[20:]
    mine = [name for name in captions(read(exact, 250, world=1)) if name != "x"]
    assert all(count == 75 for count in Counter(mine).values())  # each source in epochs of its own
    with pytest.raises(DataError, match="data.weights has 1 weights for the 2 entries"):
        stream(str(one[0]), str(other[0]), weights=[1])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_read_exactly(server, kind, tmp_path, shards):
    running = server(kind)
    url = running.url("s-{000000,000010,000020,000030}.tar")
    local = ShardDataset(sorted((tmp_path / "shards").glob("*.tar")), 8, WANT, 3)
    for _ in range(2):  # the second time without a server
        copies = stream(url, cache_dir=str(tmp_path / "cache"))
        assert isinstance(copies, ShardDataset) and not isinstance(copies, StreamDataset)
        assert [copies[i]["caption"] for i in range(40)] == [local[i]["caption"] for i in range(40)]
        running.kill()
    with pytest.raises(DataError, match="data.cache_gb=1e-06 is too small"):
        stream(f"pipe:cat {local.paths[0]}", cache_dir=str(tmp_path / "cache"), cache_gb=1e-6)
    with pytest.raises(DataError, match="data.heldout: .* read at random"):
        open_dataset(DataSettings(heldout=url), "heldout", WANT, 0)


def test_two_processes_copy_each_shard_once(server, tmp_path):
    url = server("ranges").url("s-{000000,000010,000020,000030}.tar")
    code = "import sys; from data.shard_cache import copy_shards; from pathlib import Path; "
    code += "print(len(copy_shards(sys.argv[2:], Path(sys.argv[1]), 0, 10, print)))"
    call = [sys.executable, "-c", code, str(tmp_path / "cache"), *expand_braces(url, "x")]
    both = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["4\n", "4\n"]
    copies = sorted((tmp_path / "cache").glob("*.tar"))
    originals = sorted((tmp_path / "shards").glob("*.tar"))
    assert sorted(copy.read_bytes() for copy in copies) == sorted(file.read_bytes() for file in originals)


def test_shards_of_one_name_at_two_addresses_are_two_copies(shards, tmp_path):
    one, other = shards(4, folder="a")[0], shards(4, change={i: {"txt": b"x"} for i in range(4)}, folder="b")[0]
    dataset = stream(f"pipe:cat {one}", f"pipe:cat {other}", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 8


def test_samples_of_another_encoding_are_left_out(shards):
    """Only their record is looked at here; the first sample says what is read."""
    plain = shards(4)[0]
    dataset = stream(f"pipe:cat {plain}")
    assert dataset.encoding is None
    dataset.encoding = {"vae": "other"}
    counts = Counter()
    with pytest.raises(DataError, match=f"1000 x {OTHER_ENCODING}"):
        counts.update(next(iter(dataset.endless(0, 0, 0)))["skipped"])
    assert not counts


def test_all_of_the_first_thousand(shards):
    dataset = stream(f"pipe:cat {shards(20, 20, change={i: {'png': b'<html>'} for i in range(20)})[0]}")
    with pytest.raises(
        DataError, match=r"1000 samples of data.train in a row are unusable \(1000 x image does not decode\)"
    ):
        next(StreamBatches(dataset, BatchSplit(1, 4), 0))


def test_both_ways_read_the_same_samples(shards):
    """Exact and streamed, a sample is decoded by the same code."""
    tar = shards(10)[0]
    exact, streamed = ShardDataset([tar], 8, WANT), stream(f"pipe:cat {tar}")
    for row in range(10):
        mine, theirs = exact.read(row), streamed[row]
        assert torch.equal(mine.pop("image"), theirs.pop("image"))
        assert {**mine, "position": row, "skipped": {}} == theirs
    assert isinstance(open_batches(exact, BatchSplit(1, 2), 0), Batches)


def test_no_file_name_is_a_command(shards, tmp_path, monkeypatch):
    """Commands come from the settings alone: a local shard among URLs is opened by its absolute path."""
    monkeypatch.chdir(tmp_path)
    tar = shards(10, folder="plain")[0]
    tar.with_name("pipe:touch ran;.tar").write_bytes(tar.read_bytes())
    monkeypatch.chdir(tar.parent)
    found = read(stream("*.tar", f"pipe:cat {tar}"), 20)
    assert nearly_all(found, 10) and not (tar.parent / "ran").exists()
