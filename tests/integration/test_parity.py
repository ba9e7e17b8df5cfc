"""Two ranks train what one process with the whole batch trains, at every ZeRO stage."""

import json

import pytest
import support
import torch

from models.pipeline import load_network
from trainer.record import record
from trainer.training.run import Run

STAGES = ("zero0", "zero1", "zero2", "zero3", "sharded")


@pytest.fixture(scope="module")
def plain(root, world):
    """One process, ZeRO 0."""
    run = support.single(root, "one", world, *support.PARITY, *support.zero("zero0"))
    return support.backtrack_weights(run), support.metrics(run.folder / "backtrack")


@pytest.fixture(scope="module")
def double(root):
    support.ranks("parity", root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_one(plain, double, stage):
    weights, lines = plain
    two = torch.load(double / "parity" / f"{stage}.pt")
    start = load_network(double / "base" / "pipeline" / "unet").state_dict()
    moved = max(float((weights[f"generator.{k}"] - v).abs().max()) for k, v in start.items())
    assert moved > 5e-5  # it trained
    assert support.largest_difference(weights, two) < 1e-6
    other = support.metrics(double / f"parity-{stage}" / "backtrack")
    support.assert_alike(lines, other)


def test_bfloat16_has_the_losses_of_float32(plain, root, world):
    run = support.single(root, "one-bf16", world, *support.PARITY, *support.zero("zero1"), "precision=bf16")
    support.backtrack_weights(run)
    mine, theirs = plain[1], support.metrics(run.folder / "backtrack")
    losses = [(a["loss/fake_score"], b["loss/fake_score"]) for a, b in zip(mine, theirs, strict=True)]
    losses = [pair for pair in losses if pair != (None, None)]  # lines of target switches have none
    assert len(losses) == 4 and all(b == pytest.approx(a, rel=0.02) for a, b in losses)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "sharded"])
def test_zero_stages_agree_in_one_process(plain, root, world, stage, tmp_path):
    name = support.sharded_zero3(tmp_path) if stage == "sharded" else stage
    run = support.single(root, f"alone-{stage}", world, *support.PARITY, *support.zero(name))
    assert support.largest_difference(plain[0], support.backtrack_weights(run)) < 1e-6


@pytest.mark.slow
def test_recording_on_two_sharded_ranks(root, world):
    one = root / "recording" / "one"
    one.parent.mkdir()
    record(Run(support.tiny(root, "recording-one", *support.RECORDING, f"path={one}"), world))
    support.ranks("recording", root)
    two = root / "recording" / "two"
    mine, theirs = (json.loads((p / "path.json").read_text()) for p in (one, two))
    assert [n["step"] for n in mine["nodes"]] == [n["step"] for n in theirs["nodes"]]
    for node, other in zip(mine["nodes"], theirs["nodes"], strict=True):
        for key in ("distance_to_node_0", "distance_to_neighbour"):
            assert other[key] == pytest.approx(node[key], rel=1e-4)
        if node["index"]:
            a, b = (load_network(p / f"node-{node['index']:04d}").state_dict() for p in (one, two))
            # Nodes are bfloat16: a last-bit difference of the float32 weights may round either way.
            assert all(torch.allclose(a[k], b[k], rtol=2**-7, atol=1e-6) for k in a)
