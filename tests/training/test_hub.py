"""Teachers from the Hugging Face hub: its cache, and which files are fetched."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import support
import torch
from huggingface_hub.utils import filter_repo_objects

from models.errors import ModelError
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.training.hub import _patterns, local_pipeline
from trainer.training.run import Run

CPU = torch.device("cpu")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """An offline hub with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache(hub: Path, repository: str, pipeline: Path, commit: str = "a" * 40) -> Path:
    """Puts a pipeline into the cache, as a download leaves it there."""
    root = hub / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(pipeline, root / "snapshots" / commit))


def test_hub_models_from_the_cache(shards, pipeline, hub):
    world = World(0, 1, 0, CPU)
    snapshot = cache(hub, "someone/tiny", pipeline)
    for rank in (0, 1):  # the one that may fetch, and one that may not
        for name in ("someone/tiny", "someone/tiny@" + "a" * 40):
            assert local_pipeline(name, "", "pipeline", World(rank, 1, rank, CPU)) == snapshot
    assert local_pipeline(str(pipeline), "", "pipeline", world) == pipeline
    run = Run(support.tiny(shards, "hub", "pipeline=someone/tiny"), world)
    assert run.teacher_folder == run.start_folder == snapshot / "unet"
    assert run.settings.pipeline == "someone/tiny"  # what the run's configuration keeps


def test_neither_folder_nor_cached(shards, hub):
    with pytest.raises(UserError, match="pipeline=someone/absent: no such folder.*in the cache or on the network"):
        _ = Run(support.tiny(shards, "hub", "pipeline=someone/absent"), World(0, 1, 0, CPU)).pipeline_folder
    with pytest.raises(ModelError, match="a/b/c: model_index.json is missing"):
        _ = Run(support.tiny(shards, "hub", "pipeline=a/b/c"), World(0, 1, 0, CPU)).pipeline_folder
    done = support.call("record", "--config", str(support.TINY), f"run={shards / 'x'}", "pipeline=someone/absent")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "in the cache or on the network" in done.stderr


def test_only_what_is_needed_is_fetched():
    """The patterns against file lists of the published repositories."""
    published = """.gitattributes model_index.json sd_xl_base_1.0.safetensors README.md LICENSE.md unet/model.onnx unet/config.json
        scheduler/scheduler_config.json tokenizer/merges.txt tokenizer/vocab.json tokenizer/tokenizer_config.json
        tokenizer/special_tokens_map.json tokenizer_3/spiece.model tokenizer_3/tokenizer.json vae/config.json
        unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors
        unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.bin vae_1_0/config.json
        vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.fp16.safetensors
        text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model.safetensors.index.json
        text_encoder_3/model.fp16-00001-of-00002.safetensors text_encoder_3/model.safetensors.index.fp16.json
        safety_checker/model.safetensors text_encoder/model.safetensors text_encoder/config.json""".split()
    plain = set(filter_repo_objects(published, **_patterns("")))
    half = set(filter_repo_objects(published, **_patterns("fp16")))
    weights = {name for name in plain if "safetensors" in name}
    assert weights == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors", "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
    }  # fmt: skip
    assert {name for name in half if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    }  # fmt: skip
    assert "text_encoder_3/model.safetensors.index.fp16.json" in half
    for chosen in (plain, half):
        assert {
            n for n in published if n.startswith(("tokenizer", "scheduler", "model_index", "README", "LICENSE"))
        } <= chosen
        assert not {n for n in chosen if n.startswith(("vae_1_0", "safety", "sd_xl", "unet/model.onnx"))}
