"""PickScore and HPS v2.1, against their networks called by hand, with small random weights."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from support import pictures, tensors
from torchvision import transforms
from torchvision.transforms import functional as vision
from transformers import CLIPConfig, CLIPModel

from models.errors import ModelError
from models.scorers.preference import HpsV2, PickScore

CPU = torch.device("cpu")
PROMPTS = ["A red fox by the sea", "two dogs", " ".join(["a plate of food, from above"] * 20)]
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def pick(tmp_path) -> Path:
    """A tiny model in PickScore's format, with CLIP's tokenizer and no image processor."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(vocab_size=49408, bos_token_id=49406, eos_token_id=49407)
    config = CLIPConfig(
        text_config={**small, **ids},
        vision_config={**small, "image_size": 224, "patch_size": 112},
        projection_dim=24,
    )
    torch.manual_seed(0)
    CLIPModel(config).half().save_pretrained(tmp_path)
    tokenizer = open_clip.SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(json.dumps({ends.get(k, k): v for k, v in tokenizer.encoder.items()}))
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return tmp_path


def by_hand(folder: Path, images: list[np.ndarray], mean: tuple = MEAN) -> torch.Tensor:
    """The logits of a CLIP model for the pairs of images and prompts."""
    steps = [transforms.Resize(224, vision.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, DEVIATION)])
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    network = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    ids = open_clip.tokenize(PROMPTS)  # padded with zeros after the end token, where a causal model does not look
    with torch.no_grad():
        return network(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal()


def test_pick_score_is_the_scaled_cosine(pick):
    images = pictures((300, 200), (224, 224), (230, 512))
    scores = PickScore(pick, CPU)(tensors(images), PROMPTS)
    expected = by_hand(pick, images)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert (scores - expected).abs().max() < 1e-4 and expected.std() > 0.01
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": DEVIATION}
    (pick / "preprocessor_config.json").write_text(json.dumps(settings))
    assert (PickScore(pick, CPU)(tensors(images), PROMPTS) - by_hand(pick, images, (0.1, 0.2, 0.3))).abs().max() < 1e-4
    with pytest.raises(ValueError, match="2 images and 3 prompts"):
        PickScore(pick, CPU)(tensors(images[:2]), PROMPTS)


def test_pick_score_needs_its_whole_folder(pick):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (pick / name).unlink()
    with pytest.raises(ModelError, match="tokenizer") as caught:
        PickScore(pick, CPU)
    assert "\n" not in str(caught.value)
    (pick / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read") as caught:
        PickScore(pick, CPU)
    assert "\n" not in str(caught.value)


@pytest.fixture
def architecture(tmp_path) -> str:
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    return f"local-dir:{tmp_path}"


def test_hps_is_the_cosine_of_letterboxed_images(architecture, tmp_path):
    torch.manual_seed(1)
    network = open_clip.create_model(architecture, load_weights=False).half()
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "hps.pt")
    network = network.float().eval()
    images = pictures((300, 201), (64, 64), (101, 512), (300, 201))
    boxed = []
    for image, (height, width) in zip(images, [(43, 64), (64, 64), (64, 13), (43, 64)], strict=True):
        pixels = vision.to_tensor(Image.fromarray(image))
        pixels = vision.resize(pixels, [height, width], vision.InterpolationMode.BICUBIC, antialias=True)
        left, top = (64 - width) // 2, (64 - height) // 2
        pixels = vision.pad(pixels, [left, top, 64 - width - left, 64 - height - top])
        boxed.append(vision.normalize(pixels, MEAN, DEVIATION))
    prompts = [*PROMPTS, "a cat"]
    with torch.no_grad():
        image_features = network.encode_image(torch.stack(boxed), normalize=True)
        text_features = network.encode_text(open_clip.tokenize(prompts), normalize=True)
    state = torch.get_rng_state()
    score = HpsV2(tmp_path / "hps.pt", CPU, architecture)
    assert torch.equal(state, torch.get_rng_state())
    result, expected = score(tensors(images), prompts), (image_features * text_features).sum(1)
    assert result.shape == (4,) and result.dtype == torch.float32 and not result.requires_grad
    assert (result - expected).abs().max() < 1e-5 and expected.std() > 1e-3


def test_other_files_are_no_hps(architecture, tmp_path):
    file = tmp_path / "hps.pt"
    state = open_clip.create_model(architecture, load_weights=False).state_dict()
    for changed, message in (
        (state, "no state_dict"),
        ({"state_dict": {**state, "extra": torch.zeros(1)}}, "extra"),
        ({"state_dict": {"logit_scale": torch.zeros(())}}, "Missing key"),
    ):
        torch.save(changed, file)
        with pytest.raises(ModelError, match=message) as caught:
            HpsV2(file, CPU, architecture)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no such file"):
        HpsV2(tmp_path / "none.pt", CPU)
    with pytest.raises(ModelError, match="unknown to open_clip"):
        HpsV2(file, CPU, "ViT-H-41")
