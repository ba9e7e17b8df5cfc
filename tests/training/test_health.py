"""Warnings that speak early and once; gradients that are not finite are left out, counted and survived."""

import pytest
import support
import torch

from models.pipeline import load_network
from trainer.config.schema import HealthSettings
from trainer.errors import UserError
from trainer.training.health import Health

GOOD = {
    "skipped_updates": 0, "update_ratio/generator": 1e-4, "lr/generator": 1e-5, "sample_spread": 1.0, "mismatch": 0.1,
    "target_node": 2, "step_seconds": 1.0, "data_seconds": 0.01, "loss/fake_score": 0.2,
}  # fmt: skip


def said(lines: list[dict], **settings: float) -> list[tuple[int, str]]:
    """(line, message) of everything that is said over metrics lines that differ from GOOD as given."""
    health = Health(HealthSettings(**settings))
    return [(i, text) for i, line in enumerate(lines) for text in health.observe(GOOD | line)]


def test_a_healthy_run_says_nothing():
    assert said([{}] * 30) == []
    assert said([{"target_node": 3, "mismatch": 0.01}] * 5 + [{"target_node": 2, "mismatch": 0.5}] * 9) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"update_ratio/generator": 0.0}, "generator did not change"),
        ({"sample_spread": 0.1}, "spread 0.1, at first 1"),
        ({"mismatch": 0.5}, "risen to 0.5 from 0.1"),
        ({"step_seconds": 2.0}, "2.00 s, usually 1.00 s"),
        ({"data_seconds": 0.5}, "50% of a step"),
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


def test_what_was_left_out_before_a_resume_is_not_told_again():
    assert Health(HealthSettings(stop_after=10), 120).observe(GOOD | {"skipped_updates": 120}) == []


def test_left_out_updates_are_told_and_end_a_hopeless_run():
    health = Health(HealthSettings(stop_after=10))
    for total, told, hopeless in ((0, 0, 0), (4, 1, 0), (8, 0, 0), (8, 0, 0), (12, 1, 0), (18, 0, 1)):
        messages = health.observe(GOOD | {"skipped_updates": total, "loss/fake_score": float("nan")})
        assert len(messages) == told and health.hopeless == bool(hopeless)
        assert all("left out" in m and "loss/fake_score is NaN" in m for m in messages)


class Poisoned(support.Interrupted):
    """Backtracking whose gradient on x0 is not finite in chosen steps, on one rank only."""

    bad_steps: tuple[int, ...] = ()
    bad_rank = 0

    def update(self, step, meters, until_log):
        if step in self.bad_steps and self.world.rank == self.bad_rank:
            objective, self.objective = self.objective, lambda scores: torch.full_like(scores.x0, float("nan"))
            try:
                return super().update(step, meters, until_log)
            finally:
                self.objective = objective
        return super().update(step, meters, until_log)


def poisoned(run, steps, rank=0):
    return support.backtrack_weights(run, kind=Poisoned, bad_steps=steps, bad_rank=rank)


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_is_left_out(root, world, stage, precision):
    flags = [*support.zero(stage), f"precision={precision}", "backtrack.steps=4", "backtrack.loop.log_every=1"]
    name = f"poisoned-{stage}-{precision}"
    weights = poisoned(support.single(root, name, world, *flags), (1,))
    assert all(torch.isfinite(w).all() for w in weights.values())
    lines = support.metrics(root / name / "backtrack")
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 1]
    # The generator stood still in that step, and in no other.
    assert [line["update_ratio/generator"] == 0 for line in lines] == [False, True, False, False]
    assert "step 2: 1 updates were left out" in (root / name / "backtrack" / "log.txt").read_text()


@pytest.mark.slow
def test_one_bad_rank_of_two(root):
    support.ranks("poison", root)
    for stage in ("zero0", "zero2"):
        weights = torch.load(root / "poison" / f"{stage}.pt")
        start = load_network(root / "base" / "pipeline" / "unet").state_dict()
        assert all(torch.isfinite(w).all() for w in weights.values())
        assert any(not torch.equal(weights[f"generator.{k}"], v) for k, v in start.items())
        lines = support.metrics(root / f"poison-{stage}" / "backtrack")
        assert lines[-1]["skipped_updates"] == 1


def test_a_run_that_leaves_everything_out_ends_with_its_last_good_checkpoint(root, world):
    flags = ["health.stop_after=4", "backtrack.steps=100", "backtrack.loop.save_every=2"]
    run = support.single(root, "hopeless", world, *flags)
    with pytest.raises(UserError, match="4 updates in a row.*last checkpoint is .*step-00000004"):
        poisoned(run, tuple(range(2, 100)))
    assert all(
        torch.isfinite(w).all()
        for w in load_network(run.folder / "backtrack/checkpoints/step-00000004/weights").parameters()
    )
