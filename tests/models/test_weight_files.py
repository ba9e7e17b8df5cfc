"""Which files every reader of a weights folder takes, and what is refused alike by all of them."""

import json
import shutil
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file, save_file

from models.errors import ModelError
from models.files import LORA_FILE, POINTER, WEIGHTS_FILE, weight_files
from models.lora import check_targets
from models.pipeline import empty_network, load_network, pipeline_hash, weights_hash
from models.scorers.weights import load_pretrained, read_weights
from models.settings import LoraSettings
from models.validate import check_pipeline, check_start
from trainer.distributed.world import World
from trainer.engine.weight_slices import load_folder

INDEX = f"{WEIGHTS_FILE}.index.json"
WORLD = World(0, 1, 0, torch.device("cpu"))
READERS = {
    "validation": lambda unet: check_pipeline(unet.parent),
    "start": check_start,
    "sampling": load_network,
    "training": lambda unet: load_folder(
        empty_network(unet), unet, WORLD, torch.float32, {"zero_optimization": {"stage": 0}}
    ),
    "hash": weights_hash,
    "hash of the rest": lambda unet: pipeline_hash(unet.parent),
    "targets": lambda unet: check_targets(unet, LoraSettings(rank=1)),
}


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "p"))


def refused(unet: Path, words: str, part: str = "unet") -> None:
    """Every reader that looks at this part refuses it, in the same words."""
    for name, reader in READERS.items():
        if name == "validation" or (part == "unet") != (name == "hash of the rest"):
            with pytest.raises(ModelError, match=words):
                reader(unet)


def shard(unet: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes weights as two shards with their index."""
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(weights.items())[i::2]) for i in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, unet / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: n for n, part in zip(names, parts, strict=True) for key in part}}
    (unet / INDEX).write_text(json.dumps(index))


def test_a_stale_index_beside_a_newer_file(folder):
    """It trained on one and sampled from the other. Each alone is read by all; so is an index that names the single file."""
    unet = folder / "unet"
    new = load_file(unet / WEIGHTS_FILE)
    shard(unet, {key: value + 1 for key, value in new.items()})
    words = rf"unet: has both {WEIGHTS_FILE} and {INDEX}, .*delete the outdated one"
    refused(unet, words)
    shards = weight_files_of(unet)
    shards[0].rename(unet / "away")  # a stale index often lacks its shards, too
    refused(unet, words)
    (unet / "away").rename(shards[0])
    (unet / WEIGHTS_FILE).rename(unet / "away")
    for reader in READERS.values():
        reader(unet)
    assert weight_files(unet) == shards
    sampled = load_network(unet).state_dict()
    trained = empty_network(unet)
    load_folder(trained, unet, WORLD, torch.float32, {"zero_optimization": {"stage": 0}})
    assert all(torch.equal(v, sampled[k]) and torch.equal(v, new[k] + 1) for k, v in trained.state_dict().items())
    (unet / "away").rename(unet / WEIGHTS_FILE)
    (unet / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(new, WEIGHTS_FILE)}))
    assert weight_files(unet) == [unet / WEIGHTS_FILE] and load_network(unet)


def weight_files_of(unet: Path) -> list[Path]:
    return sorted(unet.glob("*-of-*.safetensors"))


def test_what_a_folder_lacks(folder):
    unet = folder / "unet"
    whole = load_file(unet / WEIGHTS_FILE)
    (unet / WEIGHTS_FILE).rename(unet / WEIGHTS_FILE.replace("model.", "model.fp16."))
    refused(unet, "unet: has weights of the variant fp16 only: set variant=fp16")
    assert weight_files(unet, "fp16") and load_network(unet, variant="fp16")
    with pytest.raises(ModelError, match="of the variant fp16 only: set variant=fp16"):
        check_pipeline(folder, "bf16")
    index = unet / f"{WEIGHTS_FILE}.index.non_ema.json"
    index.write_text("{}")
    refused(unet, "variant fp16, non_ema only: set variant=fp16 or variant=non_ema")
    with pytest.raises(ModelError, match="its weight_map does not name"):
        weight_files(unet, "non_ema")
    index.write_text(json.dumps({"weight_map": {"a": "b"}}))
    with pytest.raises(ModelError, match='has no "metadata"'):
        weight_files(unet, "non_ema")
    for file in unet.glob("*model*"):
        file.unlink()
    shard(unet, whole)
    weight_files_of(unet)[0].unlink()
    refused(unet, "00001-of-00002.safetensors is listed in the index but missing")
    (unet / INDEX).unlink()
    refused(unet, f"has shards, but not their {INDEX}")
    save_file(whole, unet / WEIGHTS_FILE)
    save_file(whole, unet / LORA_FILE)
    for reader in (weight_files, weights_hash, load_network):
        with pytest.raises(ModelError, match=f"has both {WEIGHTS_FILE} and {LORA_FILE}"):
            reader(unet)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_git_lfs_pointers(folder, part):
    file = next(f for f in sorted((folder / part).iterdir()) if f.suffix == ".safetensors" or part == "tokenizer")
    file.write_bytes(POINTER + b"v1\noid sha256:00\nsize 1\n")
    if part == "tokenizer":
        with pytest.raises(ModelError, match=f"{file}: only the Git LFS pointer.*git lfs pull"):
            check_pipeline(folder)
    else:
        refused(folder / "unet", f"{file}: only the Git LFS pointer.*git lfs pull", part)


def test_git_lfs_pointers_of_networks_that_score(tmp_path):
    from transformers import CLIPVisionModel

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(POINTER + b"v1\n")
    with pytest.raises(ModelError, match="only the Git LFS pointer"):
        read_weights(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="only the Git LFS pointer"):
        load_pretrained(CLIPVisionModel, tmp_path, WORLD.device)


def test_files_that_are_no_weights_to_train_from(folder):
    """fp8, and files that a broken download left behind."""
    file = folder / "unet" / WEIGHTS_FILE
    whole = load_file(file)
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in whole.items()}, file, metadata={"format": "pt"})
    refused(folder / "unet", f"{file}: .* is stored as F8_E4M3, .*use the model's float16")
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder / "unet", f"{file}: not a complete safetensors file")


def test_every_verb_says_the_same(folder, shards):
    """On the command line: one line, exit code 2, no traceback."""
    file = folder / "unet" / WEIGHTS_FILE
    file.write_bytes(POINTER + b"v1\n")
    about = ["--config", str(support.TINY), *support.places(shards, "pointer"), f"pipeline={folder}"]
    calls = [[verb, *about] for verb in ("record", "backtrack", "export", "evaluate")]
    calls += [["sample", *about, "sample.source=teacher", "sample.prompts=[a]"]]
    calls += [["pretrain", *about, f"pretrain.start={folder}"]]
    calls += [["shards", "--encode", f"{shards}/shards/train-*.tar", "--pipeline", str(folder), "--resolution", "8"]]
    calls[-1] += ["--out", str(folder.parent / "encoded")]
    for verb, *arguments in calls:
        done = support.call(verb, *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{file}: only the Git LFS pointer" in done.stderr, verb
