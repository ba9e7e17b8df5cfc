"""Generators from training to a plain diffusers pipeline: one step and several, and a generator update in pieces.

test_family_runs has the other families, test_lora_runs adapters.
"""

import json

import numpy as np
import pytest
import support

from models.pipeline import weights_hash
from trainer.backtrack import backtrack
from trainer.errors import UserError
from trainer.evaluation.sources import find_source
from trainer.record import record
from trainer.training.run import Run


def test_exported_pipeline_equals_our_sampling(root, world):
    """DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1, guidance_scale=0.0), nothing else."""
    run = Run(support.tiny(root, "exported"), world)
    backtrack(run)
    folder = run.folder / "generator"
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "generator": support.generators(3), "output_type": "np"}
    theirs = support.plain(folder)(support.PROMPTS, **call).images
    ours = find_source(run, str(folder)).open(run).images(support.PROMPTS, 5, [0, 1, 2])
    ours_float = ours.permute(0, 2, 3, 1).numpy().astype(np.float32) / 255
    assert theirs.shape == ours_float.shape == (3, 8, 8, 3)
    assert theirs.std() > 0.01
    assert np.abs(theirs - ours_float).max() <= 1.01 / 255  # ours truncates to bytes
    note = json.loads((folder / "disback.json").read_text())
    assert note["conditioning_timestep"] == 749 and note["checkpoint"] == "step-00000008"
    # The weights are the averaged ones of the last checkpoint.
    last = run.folder / "backtrack" / "checkpoints" / "step-00000008" / "weights"
    assert weights_hash(folder / "unet") == weights_hash(last)


def test_a_student_from_recording_to_pipeline(root, world):
    """Its path is its own; a run with other steps refuses it; the pipeline, the checkpoint and our sampler agree."""
    path = root / "student-run" / "own"
    flags = (f"path={path}", "backtrack.student_timesteps=[999, 499]", "backtrack.steps=4", "gan.enabled=true")
    run = Run(support.tiny(root, "student-run", *flags), world)
    record(run)
    assert json.loads((path / "path.json").read_text())["timesteps"] == [999, 499]
    with pytest.raises(UserError, match=r"another generator start \(timestep 999,499, this run 749;"):
        backtrack(Run(support.tiny(root, "other", f"path={path}"), world))
    backtrack(run)
    folder = run.folder / "generator"
    call = {"num_inference_steps": 2, "guidance_scale": 0.0, "generator": support.generators(2), "output_type": "np"}
    theirs = support.plain(folder)(support.PROMPTS[:2], **call).images
    for what in (str(folder), "step-00000004"):
        ours = find_source(run, what).open(run).images(support.PROMPTS[:2], 5, [0, 1]).permute(0, 2, 3, 1).numpy() / 255
        assert np.abs(theirs - ours).max() <= 1.01 / 255  # ours truncates to bytes


def test_a_generator_turn_in_pieces_is_the_same(root, world):
    flags = (*support.PARITY, "backtrack.steps=4", *support.zero("zero1"))
    whole = support.backtrack_weights(support.single(root, "whole-turn", world, *flags))
    pieces = support.backtrack_weights(support.single(root, "pieces", world, *flags, "backtrack.generator_split=4"))
    assert support.largest_difference(whole, pieces) < 1e-6
    lines = [support.metrics(root / name / "backtrack")[-1] for name in ("whole-turn", "pieces")]
    for key in ("grad_norm/generator", "mismatch", "loss/fake_score"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-4)
    with pytest.raises(UserError, match=r"generator_split=3 does not divide the micro-batch of 4 .*use one of 1, 2, 4"):
        support.backtrack_weights(support.single(root, "thirds", world, *flags, "backtrack.generator_split=3"))
