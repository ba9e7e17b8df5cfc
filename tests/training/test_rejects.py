"""Training stops when too many samples are unusable, and tells at its end why samples were skipped."""

import pytest
import support

from data import rejects
from data.errors import DataError
from data.shard_writer import write_shards
from trainer.record import Recording
from trainer.training.loop import train


def test_the_share_counts_after_a_thousand_samples():
    rejects.check_rejects(400, {"a": 599}, 0.5)
    rejects.check_rejects(500, {"a": 500, rejects.RETRIED: 9000}, 0.5)
    with pytest.raises(DataError, match=r"501 of 1000 .* than data.max_rejected=0.5 allows \(300 x b, 201 x a\)"):
        rejects.check_rejects(499, {"a": 201, "b": 300}, 0.5)
    with pytest.raises(DataError):
        rejects.check_rejects(0, {"a": 1000}, 0.99)


def recorded(root, world, name, blank, *flags) -> dict:
    """Metrics of recording on 40 captions, of which `blank` are blank."""
    folder = root / f"rejects-{name}"
    texts = [" " if number < blank else f"the digit {number}" for number in range(40)]
    write_shards(({"__key__": f"k{i}", "txt": text} for i, text in enumerate(texts)), folder, "s", 10)
    run = support.single(root, name, world, f"path={root / name}/path", f"data.train={folder}", *flags)
    train(Recording(run), run.settings.record.loop, run.settings.health, run.stage_folder("record"), world)
    return support.metrics(run.folder / "record")[-1]


def test_a_stage_stops_or_tells(root, world, monkeypatch):
    monkeypatch.setattr(rejects, "ENOUGH", 20)
    line = recorded(root, world, "few-bad", 12)
    assert line["skipped_samples"] > 0 and line["skipped"] == {"empty caption": line["skipped_samples"]}
    log = (root / "few-bad" / "record" / "log.txt").read_text()
    assert f"record: skipped samples by reason: {line['skipped_samples']} x empty caption" in log
    with pytest.raises(DataError, match="unusable, more than data.max_rejected=0.5 allows"):
        recorded(root, world, "many-bad", 30)
    recorded(root, world, "allowed-bad", 30, "data.max_rejected=0.9")


def test_what_filters_leave_out_is_not_unusable():
    """A filter may keep a hundredth of the samples."""
    rejects.check_rejects(100, {"left out: not aesthetic >= 6.25": 9900}, 0.5)
    with pytest.raises(DataError, match="1100 of 1200 samples"):
        rejects.check_rejects(100, {"left out: not aesthetic >= 6.25": 9900, "image does not decode": 1100}, 0.5)
