"""The benchmarks measure what they say: the real stages, all their work, memory and refusals as rows."""

import pytest
import support
import torch

from benchmarks import data, evaluate
from benchmarks.evaluate_chains import metrics, write_images
from benchmarks.minimal import Minimal
from benchmarks.sdxl_step import planned, table
from benchmarks.stages import STAGES, TURN, UPDATE, measure
from data.errors import DataError
from data.reference_images import ReferenceImages
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


CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def test_chains_of_an_evaluation_do_the_same(tmp_path):
    """Ours and clean-fid's, open_clip's and torch-fidelity's have the same weights, pixels and order of images."""
    sizes = ((64, 64), (50, 77))
    profile = evaluate.Profile(rounds=1, images=2, many=8, batch=2, sizes=sizes, side=64)
    square, odd = evaluate.inception(tmp_path, profile)
    assert square.difference("clean-fid") < 0.01 and odd.difference("clean-fid, cropped as ours") < 0.01
    for other in (square.difference("torch-fidelity"), odd.difference("torch-fidelity"), odd.difference("clean-fid")):
        assert other > 0.1  # another resize, no crop
    pixels = evaluate.without_network(tmp_path, profile)
    assert pixels.difference("clean-fid") < 0.01 and len(pixels.features["ours"]) == 8
    score, features = evaluate.clip(tmp_path, profile, CLIP)
    assert score.difference("open_clip by hand") < 0.01 and score.features["ours"].shape == (2, 1)
    assert {len(found) for found in features.features.values()} == {2}
    for found in (square, odd, pixels, score, features):
        assert found.ratios("ours" if "ours" in found.spent else "ours, images only") == (1, 1)
        assert found.lines().count("\n") == len(found.spent) and {
            line.count("|") for line in found.lines().splitlines()
        } == {7}


def test_metrics_of_the_benchmark_agree(tmp_path):
    found = {
        metric: {tool: compute() for tool, compute in tools.items()}
        for metric, tools in metrics(tmp_path, 200, 32).items()
    }
    assert list(found) == ["FID", "KID", "precision, recall"]
    for metric, relative in {"FID": 1e-4, "KID": 1e-2, "precision, recall": 1e-6}.items():
        ours = found[metric].pop("ours")
        for values in found[metric].values():
            assert values == pytest.approx(ours, rel=relative) and min(values) > 0


def test_memory_of_an_evaluation_does_not_grow_with_its_images():
    few, many = evaluate.memory_alone((64, 128))
    assert abs(many - few) < 4e6 < 64 * 3 * 256**2 / 3  # not even a third of the images' bytes is kept


def test_images_decoded_ahead_are_the_same(tmp_path):
    write_images(tmp_path / "real", 12, (9, 7))
    alone = [ReferenceImages(tmp_path / "real")[number] for number in range(12)]
    images = ReferenceImages(tmp_path / "real")
    for number in [*range(6), 9, 10, 2, 3, 4, 11, -1, 0, 1]:
        assert torch.equal(images[number], alone[number]), number
    (tmp_path / "real" / "0003.png").write_bytes(b"no image")
    images = ReferenceImages(tmp_path / "real")
    assert all(torch.equal(images[number], alone[number]) for number in range(3))
    for _ in range(2):
        with pytest.raises(DataError, match=r"0003.png: does not decode"):
            images[3]
    assert torch.equal(images[4], alone[4])


def test_rows_of_reading(tmp_path):
    row = next(data.run(tmp_path, 0.1))
    ways = {"decoder", "local", "streamed", "webdataset"}
    assert row["kind"] == "images 1024 -> 1024" and all(row[way] > 0 for way in ways)
    assert row["local/decoder"] == pytest.approx(row["local"] / row["decoder"], abs=0.02)
