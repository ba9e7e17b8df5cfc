"""Warnings come early and once; updates with a gradient that is not finite are skipped, counted and survived."""

import pytest
import support
import torch

from data.sampling_order import BatchSplit
from models.pipeline import load_network
from trainer.config.schema import HealthSettings
from trainer.errors import UserError
from trainer.training.health import Health

GOOD = {
    "skipped_updates": 0, "update_ratio/generator": 1e-4, "lr/generator": 1e-5, "sample_spread": 1.0, "mismatch": 0.1,
    "fake_score_error": 0.2,
    "target_node": 2, "step_seconds": 1.0, "data_seconds": 0.01, "loss/fake_score": 0.2,
}  # fmt: skip
SPLIT = BatchSplit(1, 4, 1)


def said(lines: list[dict], **settings: float) -> list[tuple[int, str]]:
    """(line, message) of everything that is said over metrics lines that differ from GOOD as given."""
    health = Health(HealthSettings(**settings), SPLIT)
    return [(i, text) for i, line in enumerate(lines) for text in health.observe(GOOD | line)]


def test_a_healthy_run_says_nothing():
    assert said([{}] * 30) == []
    assert said([{"target_node": 3, "mismatch": 0.01}] * 5 + [{"target_node": 2, "mismatch": 0.5}] * 9) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"update_ratio/generator": 0.0}, "generator have not changed"),
        ({"sample_spread": 0.1}, "spread 0.1, at best 1"),
        ({"mismatch": 0.5}, "risen to 0.5 from 0.1"),
        ({"fake_score_error": 1.02}, "1.02 of what predicting zero"),
        ({"step_seconds": 2.0}, "2.00 s, usually 1.00 s"),
        ({"data_seconds": 0.5}, "50% of each step"),
    ],
)
def test_each_trouble_is_said_once_and_again_after_it_was_over(bad, words):
    once = said([{}] * 9 + [bad] * 7, patience=3)
    assert len(once) == 1 and words in once[0][1]
    assert len(said([{}] * 9 + [bad] * 4 + [{}] + [bad] * 4)) == 2
    if "update_ratio/generator" not in bad:
        assert said([{}] * 9 + [bad] * 2, patience=3) == []  # a hiccup is not a trouble


def test_a_learning_rate_of_zero_may_leave_weights_as_they_are():
    assert said([{"update_ratio/generator": 0.0, "lr/generator": 0.0}] * 5) == []


def resumed(before: Health, split: BatchSplit = SPLIT) -> Health:
    after = Health(before.settings, split)
    after.load_state_dict(before.state_dict())
    return after


def test_skipped_updates_before_a_resume_are_not_reported_again():
    before = Health(HealthSettings(stop_after=10), SPLIT)
    before.observe(GOOD | {"skipped_updates": 8})
    after = resumed(before)
    assert after.observe(GOOD | {"skipped_updates": 8}) == []
    after = resumed(before)
    after.observe(GOOD | {"skipped_updates": 12})
    assert after.hopeless  # the ones before the resume count


def test_a_preemption_resets_no_baseline():
    before = Health(HealthSettings(patience=3), SPLIT)
    for line in [{}] * 9 + [{"mismatch": 0.5}] * 2:
        assert before.observe(GOOD | line) == []
    bad = GOOD | {"mismatch": 0.5, "sample_spread": 0.1, "step_seconds": 2.0}
    assert "risen to 0.5 from 0.1" in resumed(before).observe(bad)[0]
    for split, slow in ((SPLIT, 1), (BatchSplit(2, 2, 1), 0)):  # other processes have another pace
        after, messages = resumed(before, split), []
        for _ in range(3):
            messages += after.observe(bad)
        assert sum("spread 0.1, at best 1" in m for m in messages) == 1
        assert sum("usually 1.00 s" in m for m in messages) == slow


def test_skipped_updates_are_reported_and_end_a_hopeless_run():
    health = Health(HealthSettings(stop_after=10), SPLIT)
    for total, told, hopeless in ((0, 0, 0), (4, 1, 0), (8, 0, 0), (8, 0, 0), (12, 1, 0), (18, 0, 1)):
        messages = health.observe(GOOD | {"skipped_updates": total, "loss/fake_score": float("nan")})
        assert len(messages) == told and health.hopeless == bool(hopeless)
        assert all("skipped" in m and "loss/fake_score is NaN" in m for m in messages)


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_with_a_gradient_that_is_not_finite_is_skipped(root, world, stage, precision):
    flags = [*support.zero(stage), f"precision={precision}", "backtrack.steps=4", "backtrack.loop.log_every=1"]
    name = f"poisoned-{stage}-{precision}"
    weights = support.poisoned(support.single(root, name, world, *flags), (1,))
    assert all(torch.isfinite(w).all() for w in weights.values())
    lines = support.metrics(root / name / "backtrack")
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 1]
    # The generator stood still in that step, and in no other.
    assert [line["update_ratio/generator"] == 0 for line in lines] == [False, True, False, False]
    assert "step 2: 1 updates were skipped" in (root / name / "backtrack" / "log.txt").read_text()


@pytest.mark.slow
def test_one_bad_rank_of_two(root):
    """DeepSpeed's own check of bf16 gradients is off: GuardedAdamW's has to skip the update on both ranks."""
    support.ranks("poison", root)
    start = load_network(root / "base" / "pipeline" / "unet").state_dict()
    for name in ("zero2-fp32", "zero0-bf16", "zero2-bf16", "sharded-bf16"):
        weights = torch.load(root / "poison" / f"{name}.pt")
        assert all(torch.isfinite(w).all() for w in weights.values()), name
        assert any(not torch.equal(weights[f"generator.{k}"], v) for k, v in start.items()), name
        assert support.metrics(root / f"poison-{name}" / "backtrack")[-1]["skipped_updates"] == 1, name


def test_a_run_that_leaves_everything_out_ends_with_its_last_good_checkpoint(root, world):
    flags = ["health.stop_after=4", "backtrack.steps=100", "backtrack.loop.save_every=2"]
    run = support.single(root, "hopeless", world, *flags)
    with pytest.raises(UserError, match="4 updates in a row.*last checkpoint is .*step-00000004"):
        support.poisoned(run, tuple(range(2, 100)))
    assert all(
        torch.isfinite(w).all()
        for w in load_network(run.folder / "backtrack/checkpoints/step-00000004/weights").parameters()
    )
