"""Training on a stream: through a server's death, and from a checkpoint on."""

import threading
import time

import pytest
import support
from servers import Server

from trainer.record import Recording
from trainer.training.loop import train


@pytest.fixture
def server(shards):
    found = Server("ranges", shards / "shards")
    found.start()
    yield found
    found.kill()


class Watched(Recording):
    """Recording that calls `at[step]` before a step."""

    at: dict = {}  # noqa: RUF012

    def update(self, step):
        self.at.get(step, lambda: None)()
        return super().update(step)


def trained(run, name, at=None):
    stage = Watched(run)
    stage.at = at or {}
    train(stage, run.settings.record.loop, run.settings.health, run.stage_folder("record"), run.world)
    return stage.fake_score.state_dict(), support.metrics(run.folder / "record")


def test_the_server_dies_and_comes_back(root, world, server):
    """Many times as many samples as a shard has, so that shards are opened while there is no server."""
    url = f"data.train={server.url('train-{000000..000001}.tar')}"
    more = ("record.steps=24", "record.batch=64", "data.shuffle_buffer=10")

    def run(name):
        return support.single(root, name, world, f"path={root / name}/path", url, *more)

    whole, lines = trained(run("stream-whole"), "whole")

    def die():
        server.kill()
        threading.Thread(target=lambda: (time.sleep(2), server.start())).start()

    again, others = trained(run("stream-killed"), "killed", {6: die})
    assert support.largest_difference(whole, again) == 0.0
    assert others[-1]["interrupted_reads"] > 0 and lines[-1]["interrupted_reads"] == 0
    assert others[-1]["skipped_samples"] == 0
    assert [{**line, "interrupted_reads": 0} for line in others] == lines


def test_a_resumed_run_goes_on_with_the_same_other_samples(root, world, server):
    url = f"data.train={server.url('train-{000000..000001}.tar')}"
    ends = []
    for name in ("a", "b"):
        run = support.single(root, f"stream-{name}", world, url)
        assert support.backtrack_weights(run, signal_at=(4,)) is None
        ends.append(support.backtrack_weights(run))
    assert support.largest_difference(*ends) == 0.0
    log = (root / "stream-a" / "backtrack" / "log.txt").read_text()
    assert log.count("data.train is streamed: shards are drawn at random, and a resumed run") == 2  # once at each start
    whole = support.backtrack_weights(support.single(root, "stream-whole-b", world, url))
    assert support.largest_difference(whole, ends[0]) > 0
