"""A run goes on with another number of processes, accumulation or ZeRO stage as if nothing had happened."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import support
import torch
from ranks_elastic import elastic_flags, pretraining, recording_flags, stop_recording, stop_training
from torch import Tensor

from data.sampling_order import BatchSplit
from models.pipeline import load_network
from trainer.backtrack import Backtracking
from trainer.checkpoint.reshard_state import redeal, reslice
from trainer.checkpoint.save_load import Checkpoints
from trainer.engine.deepspeed_internals import MASTER, MOMENTS, SavedEngine
from trainer.errors import UserError
from trainer.record import record
from trainer.training.loop import train
from trainer.training.metrics import Meters
from trainer.training.run import Run


@pytest.fixture(scope="module")
def whole(root, world):
    """The run that is never stopped: one process, ZeRO 0."""
    run = support.single(root, "elastic", world, *elastic_flags(root, "zero0"))
    return support.backtrack_weights(run), support.metrics(run.folder / "backtrack")


@pytest.fixture(scope="module")
def by_two(root, world):
    """Runs that two ranks saved in the middle of a generator's turn, of its samples' reuse, and of a logging interval."""
    support.ranks("elastic_save", root)
    return root


@pytest.fixture(scope="module")
def by_one(root, world, by_two):
    """The same, gone on with by one process with larger micro-batches, which stops in turn, and ended by two ranks."""
    for stage in support.STAGES:
        assert (root / f"chain-{stage}" / "backtrack" / "LATEST").read_text() == "step-00000003\n"
        stop_training(root, f"chain-{stage}", world, stage, 5, "backtrack.accumulation=1")
    stop_recording(root, "recording-parts", world, recording_flags(root, "parts"), 5)
    support.ranks("elastic_load", root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", support.STAGES)
def test_two_then_one_then_two(whole, by_one, stage):
    weights = torch.load(by_one / "elastic_load" / f"{stage}.pt")
    lines = support.metrics(by_one / f"chain-{stage}" / "backtrack")
    assert support.largest_difference(whole[0], weights) < 1e-6
    support.assert_alike(whole[1], lines)
    assert [line["skipped_samples"] for line in whole[1]] == [line["skipped_samples"] for line in lines]


@pytest.mark.slow
def test_no_sample_is_lost_or_read_twice(root, by_one):
    """Two ranks, then one with other micro-batches, then two: together every position once, each step its own. Every
    other step uses its predecessor's samples and reads none."""
    parts = {f.stem: [int(p) for p in f.read_text().split()] for f in (root / "chain-zero2").glob("read-*.txt")}
    assert {"read-2-0", "read-2-1", "read-1-0"} == parts.keys()
    assert min(map(len, parts.values())) >= 8
    read = sorted(p for positions in parts.values() for p in positions)
    assert read == [p for p in range(8 * 8) if p // 8 % 2 == 0]  # 8 steps of 8 samples


class Forgetful(support.Interrupted):
    """Loses the Adam moments after a resume."""

    def begin(self, step):
        super().begin(step)
        for state in self.roles["fake_score"].engine.basic_optimizer.state.values():
            for key in MOMENTS:
                state[key].zero_()


def test_lost_moments_would_be_seen(root, world, whole):
    """The proof that the comparisons above have power."""
    run = stop_training(root, "forgetful", world, "zero1", at=3)
    weights = support.backtrack_weights(run, Forgetful)
    assert support.largest_difference(whole[0], weights) > 1e-5


def saved_whole(folder: Path, role: str, names: list[str]) -> dict[tuple[str, str], Tensor]:
    """Every master weight and moment of a checkpoint, put together from all ranks."""
    zero = json.loads((folder / "state.json").read_text())["zero"][role]
    saved = SavedEngine(folder / "engines" / role, zero["stage"], names)
    parts = {n: sorted((p for p in saved.pieces[n] if p.start < p.end), key=lambda p: p.start) for n in names}
    return {(n, key): torch.cat([p.values[key] for p in parts[n]]) for n in names for key in (MASTER, *MOMENTS)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "stage", "precision"),
    [
        ("two-bf16", 3, "sharded", "bf16"),
        ("two-bf16", 3, "zero1", "bf16"),
        ("chain-zero2", 3, "sharded", "fp32"),
        ("chain-sharded", 5, "zero0", "fp32"),
        ("chain-zero0", 5, "zero2", "fp32"),
    ],
)
def test_recut_to_the_bit(root, world, by_one, name, step, stage, precision, tmp_path):
    """A checkpoint that is loaded elsewhere and saved at once holds the same numbers, in any precision and stage. Two ranks
    saved those of step 3, one process those of step 5."""
    at = f"step-{step:08d}"
    run = support.single(root, name, world, *elastic_flags(root, stage), f"precision={precision}")
    folder = run.folder / "backtrack"
    (folder / "LATEST").write_text(f"{at}\n")
    stage_ = Backtracking(run)
    keep = run.settings.backtrack.loop
    checkpoints = Checkpoints(folder, world, stage_.roles, stage_.identity, stage_.split, keep)
    _, state = checkpoints.load(stage_.regroup)
    stage_.load_state_dict(state["stage"])
    before = stage_.generator.state_dict()
    Checkpoints(tmp_path, world, stage_.roles, stage_.identity, stage_.split, keep).save(step, state, {})
    stage_.close()
    old, new = folder / "checkpoints" / at, tmp_path / "checkpoints" / at
    names = [key for key, _ in stage_.generator.trained_parameters()]
    for role in ("generator", "fake_score"):
        a, b = saved_whole(old, role, names), saved_whole(new, role, names)
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert any(bool(a[n, "exp_avg_sq"].any()) for n in names)  # there is something to lose
    masters = saved_whole(old, "generator", names)
    for key in names:  # what the network computes with is what its master weights say
        assert torch.equal(before[key].reshape(-1), masters[key, MASTER].to(before[key].dtype))
    saved = [torch.load(f, weights_only=True)["stage"]["ema"] for f in sorted(old.glob("rank-*.pt"))]
    again = torch.load(new / "rank-00000.pt", weights_only=True)["stage"]["ema"]
    everything = [(0, s.numel) for s in stage_.generator.weights.slices]
    one = reslice([s["shadow"] for s in saved], [s["ranges"] for s in saved], everything)
    two = reslice([again["shadow"]], [again["ranges"]], everything)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.slow
def test_recording_on_two_then_one_then_two(root, world, by_one):
    """Recorded by two ranks, then by one process, then by two ranks at sharded ZeRO 3, which write the path."""
    record(Run(support.tiny(root, "recording-whole", *recording_flags(root, "whole")), world))
    whole, parts = (root / "elastic-paths" / name for name in ("whole", "parts"))
    mine, theirs = (json.loads((path / "path.json").read_text())["nodes"] for path in (whole, parts))
    assert [n["step"] for n in mine] == [n["step"] for n in theirs]
    for node, other in zip(mine, theirs, strict=True):
        for key in ("distance_to_node_0", "distance_to_neighbour"):
            assert other[key] == pytest.approx(node[key], rel=1e-4)
        if node["index"]:
            a, b = (load_network(path / f"node-{node['index']:04d}").state_dict() for path in (whole, parts))
            # Nodes are bfloat16: a last-bit difference of the float32 weights may round either way.
            assert all(torch.allclose(a[k], b[k], rtol=2**-7, atol=1e-6) for k in a)


@pytest.mark.slow
def test_pretraining_on_two_then_one(root, world, by_two):
    weights = {}
    for name in ("whole", "parts"):
        stage = pretraining(root, f"pretraining-{name}", world)
        folder = stage.run.folder / "pretrain"
        train(stage, stage.settings.loop, stage.run.settings.health, folder, world)
        weights[name] = load_network(folder / "checkpoints" / "step-00000008" / "weights").state_dict()
    assert support.largest_difference(weights["whole"], weights["parts"]) < 1e-5  # the average, at a high learning rate
    start = load_network(root / "base" / "pipeline" / "unet").state_dict()
    assert support.largest_difference(weights["whole"], start) > 1e-4


def test_a_missing_candidate_is_named(root, world):
    flags = (*support.RECORDING, f"path={root / 'recording-lost-path'}")
    stop_recording(root, "recording-lost", world, flags, at=5)
    lost = sorted((root / "recording-lost-path" / "candidates").glob("step-*"))[0]
    lost.rename(root / "elsewhere")
    with pytest.raises(UserError, match=rf"{lost.name} is missing"):
        record(Run(support.tiny(root, "recording-lost", *flags), world))


def test_a_batch_that_does_not_divide_is_refused(root, world):
    three = replace(world, size=3)
    with pytest.raises(UserError, match=r"backtrack.batch=8 does not divide into 3 processes x 1 accumulation.*use 6"):
        Backtracking(support.single(root, "three", three))


def test_rows_are_dealt_by_their_place_in_the_global_batch():
    old, new = BatchSplit(2, 2, 3), BatchSplit(3, 4, 1)
    parts = [[{"x": torch.tensor(list(old.rows(p, r)))} for p in range(3)] for r in range(2)]
    for rank in range(3):
        (part,) = redeal(parts, old, new, rank)
        assert part["x"].tolist() == list(new.rows(0, rank))
    assert redeal([[], []], old, new, 0) == []


def test_pieces_are_cut_anew_whoever_held_them():
    tensors = [torch.arange(10.0), torch.arange(3.0)]
    cut = [[(0, 4), (0, 1)], [(4, 8), (1, 2)], [(8, 10), (2, 3)]]
    saved = [[t[a:b] for t, (a, b) in zip(tensors, ranges, strict=True)] for ranges in cut]
    for wanted in ([(0, 10), (0, 3)], [(3, 9), (1, 1)], [(5, 5), (2, 3)]):
        got = reslice(saved, cut, wanted)
        assert [g.tolist() for g in got] == [t[a:b].tolist() for t, (a, b) in zip(tensors, wanted, strict=True)]
    everybody = reslice([tensors, tensors], [[(0, 10), (0, 3)]] * 2, [(2, 7), (0, 3)])
    assert everybody[0].tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="from 4 on"):
        reslice([saved[0], saved[2]], [cut[0], cut[2]], [(0, 10), (0, 1)])


def test_meters_keep_the_mean_over_steps():
    """Two ranks, two micro-steps a step; then one rank, one micro-step: three steps' mean, each counting alike."""
    states = [{"sums": {"loss": 6.0}, "counts": {"loss": 4}}, {"sums": {"loss": 10.0}, "counts": {"loss": 4}}]
    merged = Meters(BatchSplit(1, 8, 1)).regroup(states, BatchSplit(2, 2, 2))
    assert (merged["sums"]["loss"] + 5.0) / (merged["counts"]["loss"] + 1) == pytest.approx((2.0 + 2.0 + 5.0) / 3)
