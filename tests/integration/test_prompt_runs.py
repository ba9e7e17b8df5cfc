"""A file of prompts alone trains both stages, resumes them exactly and is evaluated; what needs images refuses it."""

import os
import signal

import pytest
import support

from data.errors import DataError
from trainer.errors import Stopped
from trainer.planner.summary import Cluster, make_plan
from trainer.pretrain import pretrain
from trainer.record import Recording
from trainer.training.loop import train


class Interrupted(Recording):
    signal_at = 0

    def update(self, step):
        if step + 1 == self.signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().update(step)


@pytest.fixture(scope="module")
def prompts(shards):
    """Overrides that replace all shards by files of prompts."""
    file = shards / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "the digit {i}"}}\n' for i in range(13)))
    return f"data.train={file}", f"data.heldout={file}"


def recorded(run, signal_at=0) -> dict | None:
    stage = Interrupted(run)
    stage.signal_at = signal_at
    try:
        train(stage, run.settings.record.loop, run.settings.health, run.stage_folder("record"), run.world)
    except Stopped:
        return None
    return stage.fake_score.state_dict()


def test_recording(root, world, prompts):
    def run(name):
        return support.single(root, name, world, f"path={root / name}/path", *prompts)

    whole = recorded(run("prompts-whole"))
    assert recorded(run("prompts-parts"), signal_at=5) is None
    assert support.largest_difference(whole, recorded(run("prompts-parts"))) == 0.0
    lines = [support.metrics(root / name / "record") for name in ("prompts-whole", "prompts-parts")]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_backtracking_and_evaluation(root, world, prompts):
    whole = support.backtrack_weights(support.single(root, "prompts-a", world, *prompts))
    run = support.single(root, "prompts-b", world, *prompts)
    assert support.backtrack_weights(run, signal_at=(3,)) is None
    assert support.largest_difference(whole, support.backtrack_weights(run)) == 0.0
    call = [
        "--config",
        str(support.TINY),
        *support.places(root, "prompts-a"),
        *prompts,
        *support.tiny_clip(root / "clip"),
    ]
    call += ["evaluate.what=[teacher]", "evaluate.images=8", "evaluate.chunk=4", "evaluate.batch=4"]
    done = support.call("evaluate", *call, "evaluate.metrics=[clip_score]")
    assert done.returncode == 0, done.stderr
    refused = support.call("evaluate", *call, "evaluate.metrics=[fid]")
    assert (
        refused.returncode == 2
        and "holds prompts alone, but this evaluation compares with real images" in refused.stderr
    )


def test_what_needs_images_refuses_prompts(root, world, prompts):
    with pytest.raises(DataError, match=r"prompts\.jsonl holds prompts alone, but this stage needs images"):
        pretrain(support.single(root, "prompts-teacher", world, *prompts, "pretrain.start=miniature"))
    run = support.single(root, "prompts-gan", world, *prompts, "gan.enabled=true")
    with pytest.raises(DataError, match="needs images .*set gan.enabled=false"):
        support.backtrack_weights(run)
    with pytest.raises(DataError, match="the GAN term needs images"):
        make_plan(run.settings, Cluster())
    plan = make_plan(support.tiny(root, "prompts-plan", *prompts), Cluster())
    assert {name: stage["reads"] for name, stage in plan["stages"].items()} == dict.fromkeys(
        ("record", "backtrack"), "captions only: a file of prompts suffices"
    )
