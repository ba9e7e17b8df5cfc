"""`disback plan` refuses what training would refuse."""

import json
import re
import shutil

import pytest
import support

from models.errors import ModelError
from trainer.errors import UserError
from trainer.planner.summary import Cluster, make_plan


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["backtrack.generator_split=3"], "generator_split=3 does not divide the micro-batch of 4"),
        (["backtrack.teacher_ds_config=zero2"], "teacher: a frozen role runs at ZeRO stage 0 or 3"),
        (["record.teacher_ds_config=zero1"], "generator: a frozen role runs at ZeRO stage 0 or 3"),
        (["backtrack.generator_ds_config=teacher_node"], "generator: `shard_within_node` is for a frozen role"),
        (["network.compile=true", "backtrack.fake_score_ds_config=zero3"], "compile=true does not work with ZeRO-3"),
        (["network.grad_accum_dtype=fp32", "precision=bf16", "record.ds_config=zero0"], "grad_accum_dtype=fp32"),
        (["data.resolution=9"], "data.resolution=9 is not a multiple of"),
        (["conditioning_timestep=1000"], "conditioning_timestep=1000: the timesteps of"),
        (["lora.rank=4", "lora.targets=[to_z]"], "no linear or convolution layer named to_z"),
    ],
)
def test_a_plan_refuses_what_training_refuses(pipeline, shards, flags, message):
    settings = support.tiny(shards, "plan", f"pipeline={pipeline}", *flags)
    with pytest.raises((UserError, ModelError), match=re.escape(message)):
        make_plan(settings, Cluster(gpus_per_node=2))


def test_a_plan_refuses_a_pipeline_as_training_does(pipeline, shards, tmp_path):
    """By the small files alone: weights need not be there."""
    shutil.copytree(pipeline, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = support.tiny(shards, "plan", f"pipeline={tmp_path / 'copy'}")
    assert make_plan(settings, Cluster(gpus_per_node=2))["fits"]
    file = tmp_path / "copy" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_mean": [0.0]}))
    with pytest.raises(ModelError, match="latents_mean, which is not supported"):
        make_plan(settings, Cluster(gpus_per_node=2))
