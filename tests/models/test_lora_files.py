"""LoRA files of other tools: merged as peft and diffusers apply them, or refused by what they are."""

import json
from pathlib import Path

import pytest
import support
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from models.errors import ModelError
from models.files import ADAPTER_CONFIG, LORA_FILE, PEFT_FILE
from models.lora import load_merged
from models.lora_files import is_adapter
from models.pipeline import load_network
from models.validate import check_pipeline, check_start
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.evaluation.sources import find_source
from trainer.training.run import Run

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_{}"
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"attn1.to_q": 16}, "rank_pattern": {"attn2.to_k": 2, "conv1": 8}},
    "rslora and patterns": {"use_rslora": True, "alpha_pattern": {"to_k": 1}, "rank_pattern": {"mid.*to_q": 1}},
}


def adapted(unet: Path, **options: object) -> tuple[torch.nn.Module, dict[str, Tensor], LoraConfig]:
    """A network with a peft adapter of random weights, the adapter's state, and its configuration."""
    net = load_network(unet)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, net)
    return net, get_peft_model_state_dict(net), config


def close(net: torch.nn.Module, other: torch.nn.Module) -> bool:
    return torch.allclose(support.prediction(net), support.prediction(other), atol=1e-5)


@pytest.fixture(scope="module")
def unet(root) -> Path:
    return root / "base" / "pipeline" / "unet"


@pytest.mark.parametrize("name", OPTIONS)
def test_scales_are_pefts(unet, tmp_path, name):
    net, state, config = adapted(unet, **OPTIONS[name])
    config.save_pretrained(tmp_path)
    for file, prefix in ((LORA_FILE, "unet."), (PEFT_FILE, "base_model.model.")):
        save_file({prefix + key: value for key, value in state.items()}, tmp_path / file)
        merged = load_merged(unet, tmp_path, torch.float32)
        assert close(merged, net) and not close(merged, load_network(unet))
        (tmp_path / file).unlink()
    # The same configuration in the file's metadata, where diffusers writes it.
    about = {f"unet.{key}": value for key, value in json.loads((tmp_path / ADAPTER_CONFIG).read_text()).items()}
    tensors = {f"unet.{key}": value for key, value in state.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(about)})
    assert is_adapter(tmp_path / "a.safetensors")
    assert close(load_merged(unet, tmp_path / "a.safetensors", torch.float32), net)


def kohya(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """kohya's names for an adapter, with alpha beside each layer."""
    out = {}
    for key, value in state.items():
        module, _, matrix = key.rpartition(".lora_")
        module = "lora_unet_" + module.replace(".", "_")
        out |= {
            f"{module}.lora_{'down' if matrix[0] == 'A' else 'up'}.weight": value,
            f"{module}.alpha": torch.tensor(alpha),
        }
    return out


def test_files_of_diffusers_and_kohya_are_merged_as_diffusers_does(unet, tmp_path):
    """With kohya's alpha; without any alpha, where diffusers' scale is 1."""
    _, state, _ = adapted(unet)
    linear = {key: value for key, value in state.items() if "attn" in key}
    old = {
        f"unet.{k}".replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for k, v in linear.items()
    }
    files = {
        "kohya": kohya(linear, 1.0),
        "diffusers": {f"unet.{k}": v for k, v in state.items()},
        "old diffusers": old,
    }
    for name, tensors in files.items():
        (tmp_path / name).mkdir()
        file = tmp_path / name / LORA_FILE
        save_file(tensors, file)
        pipe = support.plain(unet.parent)
        pipe.load_lora_weights(tmp_path / name)
        for path in (file, file.parent):
            assert is_adapter(path)
            merged = load_merged(unet, path, torch.float32)
            assert close(merged, pipe.unet) and not close(merged, load_network(unet)), name


def test_what_is_no_plain_lora_is_called_by_its_name(unet, tmp_path):
    _, state, config = adapted(unet)
    tensors = {f"unet.{key}": value for key, value in state.items()}
    q = f"unet.{LAYER.format('q')}"
    text = kohya(state, 1.0) | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)}
    cases = {
        "DoRA": tensors | {f"{q}.lora_magnitude_vector": torch.zeros(3)},
        "LoHa or LoKr": {"lora_unet_x.hada_w1_a": torch.zeros(2, 2)},
        "also changes the text encoders .lora_te1_": text,
        "also changes the text encoders .text_encoder.": tensors | {"text_encoder.x.lora_A.weight": torch.zeros(1)},
        "kohya's. that diffusers cannot convert": {"lora_unet_mid_block_x.lora_down.weight": torch.zeros(2, 2)},
        "is not a LoRA: its keys are such as conv": {"conv": torch.zeros(1)},
        "module 'nowhere.to_q'": {f"unet.nowhere.to_q.lora_{m}.weight": torch.zeros(2, 2) for m in "AB"},
    }
    for words, broken in cases.items():
        save_file(broken, tmp_path / LORA_FILE)
        with pytest.raises(ModelError, match=f"^{tmp_path}.*{words}"):
            load_merged(unet, tmp_path, torch.float32)
    save_file(tensors, tmp_path / LORA_FILE)
    config.save_pretrained(tmp_path)
    about = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    for change, words in (
        ({"peft_type": "LOHA"}, "describes a LOHA"),
        ({"use_dora": True}, "describes a DORA"),
        ({"r": 8}, "has rank 4, its configuration says 8"),
        ({"lora_alpha": None}, "gives no scale"),
    ):
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(about | change))
        with pytest.raises(ModelError, match=words):
            load_merged(unet, tmp_path, torch.float32)


def test_a_lora_as_start_is_refused_with_a_way_that_works(root, unet, tmp_path):
    _, state, _ = adapted(unet)
    file = tmp_path / "style.safetensors"
    save_file(kohya({key: value for key, value in state.items() if "attn" in key}, 1.0), file)
    with pytest.raises(ModelError, match=rf"^pipeline {file}: a LoRA \(kohya's\), not whole weights"):
        check_pipeline(file)
    run = Run(support.tiny(root, "lora-start", f"generator_start={file}"), World(0, 1, 0, torch.device("cpu")))
    with pytest.raises(ModelError, match=rf"^generator_start {file}: a LoRA \(kohya's\).*FUSED/unet") as refusal:
        run.require_pipeline()
    code = str(refusal.value).partition('python -c "')[2].rpartition('"')[0]
    for word, value in (("PIPELINE", unet.parent), ("LORA", file), ("FUSED", tmp_path / "fused")):
        code = code.replace(f"'{word}'", f"'{value}'")
    exec(code, {})
    assert close(load_network(check_start(tmp_path / "fused" / "unet")), load_merged(unet, file, torch.float32))
    with pytest.raises(ModelError, match="a whole pipeline, a denoiser's folder is expected: set .*fused/unet"):
        check_start(tmp_path / "fused")
    source = find_source(run_of(root), str(file))
    assert source.name == "style" and source.base == unet
    images = source.open(run_of(root)).images(support.PROMPTS, 0, [0, 1, 2])
    assert images.shape == (3, 3, 8, 8)


def run_of(root: Path) -> Run:
    return Run(support.tiny(root, "lora-source"), World(0, 1, 0, torch.device("cpu")))


def test_a_whole_model_in_one_file_is_refused_with_the_way_out(root, tmp_path, monkeypatch):
    """Also by a relative path, which looks like a name of the hub."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(1)}, "models/xl.safetensors")
    run = Run(support.tiny(root, "single", "pipeline=models/xl.safetensors"), World(0, 1, 0, torch.device("cpu")))
    with pytest.raises(
        ModelError, match="^pipeline models/xl.safetensors: a whole model in one file.*from_single_file"
    ):
        run.require_pipeline()
    with pytest.raises(UserError, match="'models/xl.safetensors' is a whole model in one file"):
        find_source(run_of(root), "models/xl.safetensors")
    with pytest.raises(UserError, match="'models/absent.safetensors' is not generator"):
        find_source(run_of(root), "models/absent.safetensors")
    with pytest.raises(ModelError, match=r"^generator_start models/xl.safetensors: a whole model in one file"):
        check_start(Path("models/xl.safetensors"))
    assert callable(StableDiffusionXLPipeline.from_single_file)
