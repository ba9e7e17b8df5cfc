"""The benchmarks measure what they say: the real stages, all their work, memory and refusals as rows."""

import pytest
import support
import torch

from benchmarks.minimal import Minimal
from benchmarks.sdxl_step import planned, table
from benchmarks.stages import STAGES, TURN, UPDATE, measure
from models.architecture import find_architecture
from models.profile import count_flops
from trainer.backtrack import Backtracking
from trainer.record import Recording
from trainer.training.run import Run

FLAGS = ("backtrack.path=none", "backtrack.fake_updates=2", "backtrack.steps=1000", "record.steps=1000")
FLAGS += ("backtrack.batch=4", "record.batch=4", "record.probe_every=1000", "network.attention=math")


def test_rows_of_the_stages(shards, pipeline, world):
    places = [f"pipeline={pipeline}", f"path={shards / 'measured' / 'path'}"]
    settings = support.tiny(shards, "measured", *FLAGS, *places, "backtrack.accumulation=2")
    rows = [
        {"stage": name, "attention": "math"} | measure(name, settings, 4, world) for name in ("record", "backtrack")
    ]
    for row in rows:
        row["plan"] = planned(row["stage"], settings, find_architecture(str(pipeline)))
        assert set(row["plan"]) == ({TURN, UPDATE} if row["stage"] == "backtrack" else {UPDATE})
        assert row["kernel"] == "math" and row["mfu"] is None and row["step_seconds"] > 0
    record, backtrack = rows
    assert record[TURN] is None and record[UPDATE]["peak_gb"] > 0.1
    # What was executed is the counted work of an average step: without the first layers' input gradients, which nobody
    # computes, and with the text encoders.
    counts = [record[UPDATE]["tflop"], (backtrack[TURN]["tflop"] + 2 * backtrack[UPDATE]["tflop"]) / 2]
    for row, executed in zip(rows, counts, strict=True):
        assert 0.97 < executed / (row["step_tflops"] * row["step_seconds"]) < 1.1
    # A turn and two updates take the time of two steps, of which a turn's is measured in parts.
    parts = backtrack[TURN]["seconds"] + 2 * backtrack[UPDATE]["seconds"]
    assert 0.5 < parts / (2 * backtrack["step_seconds"]) < 1.5
    refused = measure("record", support.tiny(shards, "no", *FLAGS, *places, "network.attention=cudnn"), 4, world)
    assert "network.attention=cudnn cannot run here" in refused["reason"]
    lines = table([*rows, rows[0] | refused]).splitlines()
    assert len({line.count("|") for line in lines}) == 1


class Greedy(Recording):
    def update(self, step):
        torch.empty(1 << 50)  # a petabyte


def test_too_little_memory_is_a_row(shards, pipeline, world, monkeypatch):
    monkeypatch.setitem(STAGES, "record", Greedy)
    flags = (*FLAGS, f"pipeline={pipeline}", f"path={shards / 'greedy' / 'path'}")
    row = measure("record", support.tiny(shards, "greedy", *flags), 4, world)
    assert "allocate memory" in row["reason"] and set(row) == {"reason"}


@pytest.mark.parametrize("gan", [False, True])
def test_the_minimal_loop_does_the_same_work(shards, pipeline, world, gan):
    """Networks, text encoders, autoencoder, recomputation: all FLOP of a cycle, with the GAN term and without."""
    flags = [f"gan.enabled={gan}", "network.checkpointing=true", "backtrack.batch=1", "backtrack.reuse_x0=true"]
    settings = support.tiny(
        shards, f"cycle-{gan}", *FLAGS[:4], "network.attention=math", *flags, f"pipeline={pipeline}"
    )
    run = Run(settings, world)
    run.stage_folder("backtrack")
    stage = Backtracking(run)
    minimal = Minimal(run, stage.sampler.latent_shape)
    try:
        stage.begin(0)
        ours = count_flops(lambda: [stage.update(step) for step in range(2)])
        assert ours == count_flops(minimal.cycle) > 0
    finally:
        stage.close()
