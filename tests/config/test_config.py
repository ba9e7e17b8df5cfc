"""The configuration: unknown keys, types, overrides, files over files; DeepSpeed's JSONs."""

import json

import pytest
import support

from trainer.config.deepspeed import deepspeed_config, micro_batch
from trainer.config.load import load_settings
from trainer.config.reference import reference
from trainer.distributed.world import World
from trainer.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backtrack.guidance=3", r"unknown key 'backtrack.guidance': did you mean 'backtrack.guidance_scale'"),
        ("backtrack.walk.intervall=3", r"did you mean 'backtrack.walk.interval'"),
        ("sed=1", r"unknown key 'sed': did you mean 'seed'"),
        ("guidance_scale=1", r"unknown key 'guidance_scale': the nearest known key is '.*guidance_scale'"),
        ("backtrack.path=wlak", r"key 'backtrack.path': .*'walk', 'warm' or 'none'.*got 'wlak'"),
        ("backtrack.batch=many", r"key 'backtrack.batch': .*got 'many'"),
        ("backtrack.steps=0", r"key 'backtrack.steps'.*greater than or equal to 1"),
        ("backtrack.steps", r"'backtrack.steps' is not understood"),
        ("seed.x=1", r"seed is a value, not a section"),
    ],
)
def test_mistakes_name_the_key(override, message):
    with pytest.raises(UserError, match=message):
        load_settings(support.TINY, [override])


def test_values(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("run: runs/x\nbacktrack: {generator: {lr: 1e-5}, path: warm}\n")
    settings = load_settings(file, ["backtrack.generator.betas=[0, 0.9]", "record.optimizer.lr=2e-6"])
    assert settings.backtrack.generator.lr == 1e-5  # which YAML 1.1 reads as a string
    assert settings.backtrack.generator.betas == (0.0, 0.9) and settings.record.optimizer.lr == 2e-6
    assert str(settings.path_folder) == "runs/x/path"


def test_files_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("run: a\nseed: 3\nbacktrack: {batch: 8, clip: 2}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nrun: b\nbacktrack: {batch: 16}\n")
    settings = load_settings(tmp_path / "b.yaml", [])
    assert (settings.run, settings.seed, settings.backtrack.batch, settings.backtrack.clip) == ("b", 3, 16, 2)
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nrun: a\n")
    with pytest.raises(UserError, match="circle"):
        load_settings(tmp_path / "b.yaml", [])


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        load_settings(tmp_path / "none.yaml", [])
    (tmp_path / "a.yaml").write_text("run: [")
    with pytest.raises(UserError, match="not YAML"):
        load_settings(tmp_path / "a.yaml", [])
    (tmp_path / "a.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="key 'run' is missing"):
        load_settings(tmp_path / "a.yaml", [])


@pytest.mark.parametrize("file", sorted((support.REPOSITORY / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_configurations_are_valid(file):
    load_settings(file, [])


def world(size):
    return World(0, size, 0, "cpu")


def test_batches_that_do_not_divide():
    assert micro_batch(32, 2, 4, "backtrack") == 4
    with pytest.raises(UserError, match=r"backtrack.batch=30 does not divide into 4 processes x 2 .* use 24"):
        micro_batch(30, 2, 4, "backtrack")


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "teacher"])
def test_deepspeed_configurations(name):
    config = deepspeed_config(name, 2, 3, 10.0, "bf16", 4)
    assert config["train_batch_size"] == 24 and config["gradient_clipping"] == 10.0 and config["bf16"]["enabled"]


def test_deepspeed_contradictions_are_refused(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    with pytest.raises(UserError, match="own.json: 'gradient_clipping' is set by `clip` in the YAML"):
        deepspeed_config(str(file), 1, 1, 0.0, "fp32", 1)
    file.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        deepspeed_config(str(file), 1, 1, 0.0, "fp32", 1)
    with pytest.raises(UserError, match="known names: teacher, teacher_node, zero0"):
        deepspeed_config("zero9", 1, 1, 0.0, "fp32", 1)


def test_the_written_reference_is_the_codes():
    assert (support.REPOSITORY / "docs" / "configuration.md").read_text() == reference(), "run `make docs`"
