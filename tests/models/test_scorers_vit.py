"""The ViT embeddings of FD-DINOv2 and CMMD, against the same networks written out, with small random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import pictures, tensors
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from models.errors import ModelError
from models.scorers.cmmd import Cmmd
from models.scorers.dinov2 import DinoV2

CPU = torch.device("cpu")
WIDTH, DEPTH = 128, 2


def dino_weights() -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of DINOv2's files, trained on 37 x 37 patches."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + 37 * 37, WIDTH), "mask_token": (1, WIDTH)}
    layers = {"patch_embed.proj": (WIDTH, 3, 14, 14)}
    norms = ["norm"]
    for block in (f"blocks.{place}" for place in range(DEPTH)):
        layers |= {
            f"{block}.attn.qkv": (3 * WIDTH, WIDTH),
            f"{block}.attn.proj": (WIDTH, WIDTH),
            f"{block}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"{block}.mlp.fc2": (WIDTH, 4 * WIDTH),
        }
        norms += [f"{block}.norm1", f"{block}.norm2"]
        shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    state = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    for name, shape in layers.items():
        scale = torch.Size(shape[1:]).numel() ** -0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=rng) * scale
        state[f"{name}.bias"] = torch.randn(shape[0], generator=rng) * 0.1
    return state


def dino_positions(positions: torch.Tensor, offset: float = 0.1) -> torch.Tensor:
    """[1 + 37 37, D] to [1 + 16 16, D]: pixel i of 16 lies at (i + 1/2) / scale - 1/2 of 37, scale 16.1 / 37."""
    at = (torch.arange(16) + 0.5) * 37 / (16 + offset) - 0.5
    at = at * 2 / 36 - 1  # as grid_sample counts: -1 and 1 are the outermost pixels
    where = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
    grid = positions[1:].T.reshape(1, -1, 37, 37)
    grid = functional.grid_sample(grid, where[None], "bicubic", padding_mode="border", align_corners=True)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def dino_forward(state: dict[str, torch.Tensor], x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The class token of a pre-norm ViT with layer scales, for normalised images [B, 3, 224, 224]."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    patches = functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    patches = patches.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), 1, WIDTH), patches], 1) + positions
    for block in (f"blocks.{place}" for place in range(DEPTH)):
        q, k, v = (
            linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        )
        attention = (q @ k.mT / 8).softmax(-1) @ v
        x = x + linear(f"{block}.attn.proj", attention.transpose(1, 2).flatten(2)) * state[f"{block}.ls1.gamma"]
        hidden = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", hidden) * state[f"{block}.ls2.gamma"]
    return norm("norm", x)[:, 0]


def test_dinov2_features_are_the_class_token_with_dinov2s_positions(tmp_path):
    state, images = dino_weights(), pictures((300, 200), (224, 224), (512, 640))
    torch.save(state, tmp_path / "dino.pth")
    features = DinoV2(tmp_path / "dino.pth", CPU, WIDTH, DEPTH)(tensors(images))
    pixels = np.stack([np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC)) for image in images])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(pixels) / 255 - mean) / deviation).permute(0, 3, 1, 2)
    expected = dino_forward(state, x, dino_positions(state["pos_embed"][0]))
    assert features.shape == (3, WIDTH) and features.dtype == torch.float32
    assert (features - expected).abs().max() < 1e-4
    unshifted = dino_forward(state, x, dino_positions(state["pos_embed"][0], offset=0))
    assert (features - unshifted).abs().max() > 0.01


def test_other_files_are_no_dinov2(tmp_path):
    state, file = dino_weights(), tmp_path / "dino.pth"
    for changed, message in (
        ({"weight": torch.zeros(3)}, "no position embeddings"),
        ({"pos_embed": 3}, "no position embeddings"),
        ({**state, "register_tokens": torch.zeros(1, 4, WIDTH)}, "register_tokens"),
        ({key: value for key, value in state.items() if "blocks.1" not in key}, "blocks.1"),
    ):
        torch.save(changed, file)
        with pytest.raises(ModelError, match=message) as caught:
            DinoV2(file, CPU, WIDTH, DEPTH)
        assert "\n" not in str(caught.value)
    torch.save(state, file)
    with pytest.raises(ModelError, match="24 blocks of width 1024"):
        DinoV2(file, CPU)
    with pytest.raises(ModelError, match="no such file"):
        DinoV2(tmp_path / "none.pth", CPU)


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP model of transformers, for images of 56 pixels."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = {**small, "vocab_size": 99, "max_position_embeddings": 16}
    vision = {**small, "image_size": 56, "patch_size": 14, "projection_dim": 24}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_cmmd_embeddings_are_clips_of_floor_crops(clip_folder):
    images = pictures((101, 60), (60, 101), (56, 56))
    embeddings = Cmmd(clip_folder, CPU)(tensors(images))
    network = CLIPModel.from_pretrained(clip_folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])

    def by_hand(start: int) -> torch.Tensor:
        boxes = [(start, 0, start + 60, 60), (0, start, 60, start + 60), (0, 0, 56, 56)]
        crops = [
            Image.fromarray(image).crop(box).resize((56, 56), Image.BICUBIC)
            for image, box in zip(images, boxes, strict=True)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])) / 255
        with torch.no_grad():
            found = network.get_image_features(pixel_values=((pixels - mean) / deviation).permute(0, 3, 1, 2))
        return found.pooler_output / found.pooler_output.norm(dim=1, keepdim=True)

    assert embeddings.shape == (3, 24) and embeddings.dtype == torch.float32
    assert (embeddings - by_hand(20)).abs().max() < 1e-5  # (101 - 60) // 2
    assert (embeddings - by_hand(21)).abs().max() > 1e-4


def test_folders_that_are_no_clip(clip_folder):
    with pytest.raises(ModelError, match="no config.json"):
        Cmmd(clip_folder / "none", CPU)
    weights = clip_folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ModelError, match="cannot be read") as caught:
        Cmmd(clip_folder, CPU)
    assert "\n" not in str(caught.value)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    other = CLIPConfig(text_config={**small, "vocab_size": 99}, vision_config={**small, "image_size": 56})
    whole = (clip_folder / "config.json").read_text()
    CLIPModel(other).save_pretrained(clip_folder)
    (clip_folder / "config.json").write_text(whole)  # of two layers, the weights have one
    with pytest.raises(ModelError, match="lacks .* weights of a CLIPVisionModelWithProjection"):
        Cmmd(clip_folder, CPU)
