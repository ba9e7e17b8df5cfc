"""The configuration: unknown keys, types, overrides, files over files; DeepSpeed's JSONs."""

import json

import pytest
import support
import yaml

from trainer.config.deepspeed import deepspeed_config, micro_batch
from trainer.config.load import load_settings
from trainer.config.reference import reference
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.planner.search import changed


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
        (f"seed={2**63}", r"key 'seed': Input should be less than 9223372036854775808"),
        (f"sample.seed={2**64}", r"key 'sample.seed': Input should be less than 9223372036854775808"),
        (f"evaluate.seed={-(2**63) - 1}", r"key 'evaluate.seed': Input should be greater than or equal to -9223"),
        (f"pretrain.miniature.seed={2**63}", r"key 'pretrain.miniature.seed': Input should be less than"),
        (
            r'sample.prompts=["a", "b \ud83d"]',
            r"key 'sample.prompts': .*prompt 1: half a surrogate pair at character 2",
        ),
        ("seed=yes", r"key 'seed': a number is expected, got true"),
        ("seed=010", r"key 'seed': 010 is octal to some readers of YAML: write it without the leading 0"),
        ("seed=1:30", r"key 'seed': .*got '1:30'"),
        ("seed=2024-13-45", r"key 'seed': .*got '2024-13-45'"),
        ("seed=!!int x", r"override seed=!!int x: the value is not YAML: invalid literal"),
        ("backtrack.generator.betas=[0.9, on]", r"key 'backtrack.generator.betas': a number is expected, got true"),
        ("lora.alpha=off", r"key 'lora.alpha': a number is expected, got false"),
        ("backtrack={batch: 8, steps: 4, batch: 16}", r"key 'batch' stands twice, in line 1"),
        ("run=$NOWHERE_SET/x", r"key 'run': the environment variable NOWHERE_SET is not set, or empty"),
        ("path=~no_such_user/x", r"key 'path': ~no_such_user has no home directory here"),
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


def test_a_key_stands_once(tmp_path):
    """Also in a section, quoted or not; what a merge brings in may be replaced."""
    file = tmp_path / "a.yaml"
    for text, lines in (
        ("run: a\nseed: 1\nrun: b\n", "1 and 3"),
        ("run: a\ndata:\n  train: x\n  'train': y\n", "3 and 4"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"a.yaml: not YAML: key '.*' stands twice, in lines {lines}$"):
            load_settings(file, [])
    file.write_text(
        "run: a\nrecord: {optimizer: &same {lr: 1e-5, eps: 1e-4}}\nbacktrack: {generator: {<<: *same, lr: 2e-5}}\n"
    )
    settings = load_settings(file, [])
    assert (settings.backtrack.generator.lr, settings.backtrack.generator.eps) == (2e-5, 1e-4)


@pytest.mark.parametrize("text", ["2024-13-45", "2024-01-31", "010", "1:30", "0o17"])
def test_what_yaml_takes_for_something_else_is_the_text_that_it_is(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"run: {text}")
    assert load_settings(tmp_path / "a.yaml", []).run == text
    assert yaml.safe_load(yaml.safe_dump({"run": text})) == {"run": text}  # as the run's config.yaml has it


def test_files_in_other_encodings(tmp_path):
    file = tmp_path / "a.yaml"
    for encoding in ("latin-1", "utf-16"):
        file.write_bytes("run: a\nlicense: für alle".encode(encoding))
        with pytest.raises(UserError, match="a.yaml: not UTF-8 text .byte [0-9]+.: save it as UTF-8$"):
            load_settings(file, [])
    file.write_bytes("run: ä".encode("utf-8-sig"))
    assert load_settings(file, []).run == "ä"
    (tmp_path / "own.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="own.json is not JSON"):
        deepspeed_config(str(tmp_path / "own.json"), 1, 1, 0.0, "fp32", 1)


# Settings that a person may write a path into. A new one belongs here, and its type is PathText.
PATHS = (
    "run pipeline path generator_start data.train data.heldout data.labelled data.cache_dir pretrain.start pretrain.ds_config "
    "record.ds_config record.teacher_ds_config backtrack.teacher_ds_config backtrack.generator_ds_config "
    "backtrack.fake_score_ds_config sample.source sample.out export.out report.compare evaluate.what evaluate.clip_pretrained "
    "evaluate.prompts evaluate.reference evaluate.weights evaluate.networks evaluate.cache evaluate.classifier"
).split()


def test_home_and_variables_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    for key in PATHS:
        for text, path in (
            ("~/a", "/home/someone/a"),
            ("$SCRATCH/a", "/scratch/a"),
            ("~/${SCRATCH}", "/home/someone//scratch"),
        ):
            shape = {"report.compare": "[{}]", "evaluate.networks": "{{clip: {}}}", "data.train": "[b, {}]"}.get(
                key, "{}"
            )
            given = shape.format(f"'{text}'")
            found = load_settings(support.TINY, [f"{key}={given}"])
            for part in key.split("."):
                found = getattr(found, part)
            one = {list: lambda value: value[-1], dict: lambda value: value["clip"]}.get(type(found), str)(found)
            assert one.replace("//", "/") == path.replace("//", "/"), key
    clip = load_settings(support.TINY, ["evaluate.clip_model=local-dir:~/clip"]).evaluate.clip_model
    assert clip == "local-dir:/home/someone/clip"
    assert load_settings(support.TINY, ["evaluate.clip_model=ViT-B-32"]).evaluate.clip_model == "ViT-B-32"


def test_a_literal_dollar_in_a_path(monkeypatch):
    """`$$` before a name; a settings object that a plan changes is not expanded once more."""
    monkeypatch.setenv("SCRATCH", "/scratch")
    flags = ["run=$$SCRATCH/$SCRATCH/$${x}", "path=a$/$5$$", "evaluate.clip_model=local-dir:$$a"]
    for settings in (read := load_settings(support.TINY, flags), changed(read, {"seed": 3})):
        assert (settings.run, settings.path) == ("$SCRATCH//scratch/${x}", "a$/$5$$")
        assert settings.evaluate.clip_model == "local-dir:$a"


def test_every_text_setting_is_a_path_or_known_not_to_be(monkeypatch):
    """A path setting that forgets its type fails here."""
    texts = {
        line.split("`")[1]
        for line in reference().splitlines()
        if "| str" in line or "dict[" in line or "list[str]" in line
    }
    other = "variant data.image_keys data.caption_key lora.targets sample.prompts data.caption_field data.filters export.checkpoint export.license "
    other += "export.push_to_hub evaluate.folder evaluate.clip_model evaluate.prompt_key"
    assert texts - set(other.split()) == set(PATHS)


def test_home_in_arguments_and_in_extends(tmp_path, monkeypatch):
    """A shell does not expand the ~ of --config=~/a.yaml."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("run: a\nseed: 3\n")
    (tmp_path / "b.yaml").write_text("extends: ~/a.yaml\nsee: 4\n")
    done = support.call("report", "--config=~/b.yaml")
    assert done.returncode == 2 and "b.yaml: unknown key 'see': did you mean 'seed'" in done.stderr
    done = support.call("shards", "--index=~/none.tar")
    assert f"shard {tmp_path}/none.tar does not exist" in done.stderr
    assert (
        "the environment variable NOWHERE_SET is not set"
        in support.call("shards", "--digits", "--out=$NOWHERE_SET/x").stderr
    )


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


def test_several_merges_are_laid_over_each_other(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        f"extends: {support.TINY}\nrecord: {{<<: {{steps: 3, probe: 5}}, <<: {{nodes: 2}}, steps: 7}}\nrun: runs/a$1\n"
    )
    settings = load_settings(file, [])
    assert (settings.record.steps, settings.record.probe, settings.record.nodes) == (7, 5, 2)
    assert settings.run == "runs/a$1"  # no name of a variable
