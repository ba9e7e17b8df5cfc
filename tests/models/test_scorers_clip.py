"""CLIP features and scores, against open_clip called by hand, with random weights."""

import json
import os
import shutil
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import pictures, tensors
from torchvision.transforms.functional import center_crop

from models.errors import ModelError
from models.scorers.clip import ClipImages, ClipScore, cached_clip
from models.scorers.preprocess import Prepare

CPU = torch.device("cpu")
PROMPTS = ["A red fox by the sea", "two dogs", "a plate of food, from above"]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny CLIP model in open_clip's format, with a preprocessing of its own."""
    folder = tmp_path / "clip"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def published(folder, monkeypatch):
    """The tiny model under a name of open_clip, with a tag whose weights are in the hub's cache, without a
    network."""

    def refuse(*_):
        raise AssertionError("contacts the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    models, tags = open_clip.factory._MODEL_CONFIGS, open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(models, "tiny-clip", TINY)
    monkeypatch.setitem(models, "tiny-clip-quickgelu", {**TINY, "quick_gelu": True})
    plain = dict(hf_hub="someone/tiny/", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize_mode="squash")
    quick = dict(plain, quick_gelu=True)
    monkeypatch.setitem(tags, "tiny-clip", {"plain": plain, "quick": quick, "absent": dict(plain, hf_hub="no/one/")})
    monkeypatch.setitem(tags, "tiny-clip-quickgelu", {"quick": quick})
    snapshot = folder.parent / "hub" / "models--someone--tiny" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    blob = snapshot.parent.parent / "blob"  # the cache holds links to files without a suffix
    shutil.copy(folder / "open_clip_model.safetensors", blob)
    (snapshot / "open_clip_model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "hub"))
    return snapshot / "open_clip_model.safetensors"


def test_a_folder_scores_as_open_clip_does(folder):
    model = f"local-dir:{folder}"
    images = pictures((101, 60), (48, 48), (60, 300))
    network, _, transform = open_clip.create_model_and_transforms(model)
    network.eval()
    with torch.no_grad():
        features = network.encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]))
        text = network.encode_text(open_clip.tokenize(PROMPTS))
    state = torch.get_rng_state()
    score = ClipScore(model, "", CPU)
    assert torch.equal(state, torch.get_rng_state())
    assert (ClipImages(model, "", CPU)(tensors(images)) - features).abs().max() < 1e-6
    result, expected = score(tensors(images), PROMPTS), torch.cosine_similarity(features, text)
    assert result.shape == (3,) and result.dtype == torch.float32 and not result.requires_grad
    assert (result - expected).abs().max() < 1e-6 and expected.std() > 1e-3
    with pytest.raises(ValueError, match="3 images and 1 prompts"):
        score(tensors(images), PROMPTS[:1])


def test_vit_b_32_from_a_file_of_half_precision(tmp_path):
    torch.manual_seed(0)
    network = open_clip.create_model("ViT-B-32").half()
    file = tmp_path / "clip.safetensors"
    save_file(network.state_dict(), file)
    network = network.float().eval()
    images = pictures((300, 200), (224, 224), (256, 512))
    transform = open_clip.image_transform(224, is_train=False)
    score = ClipScore("ViT-B-32", str(file), CPU, prefix="A photo depicts ", prepare=Prepare("square", 256))
    file.unlink()  # of 300 MB
    squares = [center_crop(Image.fromarray(image), min(image.shape[:2])) for image in images]
    squares = [square.resize((256, 256), Image.LANCZOS) for square in squares]
    with torch.no_grad():
        features = network.encode_image(torch.stack([transform(square) for square in squares]))
        text = network.encode_text(open_clip.tokenize([f"A photo depicts {prompt}" for prompt in PROMPTS]))
    expected = torch.cosine_similarity(features, text)
    result = score(tensors(images), PROMPTS)
    assert (result - expected).abs().max() < 1e-6 and expected.std() > 1e-3


def test_a_prefix_follows_the_start_token_of_the_truncated_prompt(folder):
    score = ClipScore(f"local-dir:{folder}", "", CPU, prefix="A photo depicts ")
    start, end = 49406, 49407
    prefix = open_clip.tokenize("A photo depicts ")[0, 1:4].tolist()
    assert end not in prefix and 0 not in prefix  # three tokens
    word = open_clip.tokenize("dog")[0, 1].item()
    for words in (1, 70, 71, 72, 73, 75, 76, 200):
        ids = [start, *prefix, *[word] * words, end][:77]
        if len(ids) == 77:
            ids[-1] = end
        found = score.tokens([" ".join(["dog"] * words)])[0].tolist()
        assert found == ids + [0] * (77 - len(ids)), words
    plain = ClipScore(f"local-dir:{folder}", "", CPU)
    assert torch.equal(plain.tokens(PROMPTS), open_clip.tokenize(PROMPTS))


def test_a_tags_weights_come_from_the_cache_with_its_preprocessing(published, folder):
    assert cached_clip("tiny-clip", "plain") == published
    assert cached_clip("tiny-clip", "plain", folder.parent / "hub") == published
    assert cached_clip("tiny-clip", "plain", folder) is None and cached_clip("tiny-clip", "absent") is None
    assert cached_clip("tiny-clip", "other") is None and cached_clip("unknown", "plain") is None
    images = pictures((101, 60), (48, 48))
    network, _, transform = open_clip.create_model_and_transforms(
        "tiny-clip", str(published), image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4), image_resize_mode="squash"
    )
    with torch.no_grad():
        expected = network.eval().encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]))
    assert (ClipImages("tiny-clip", "plain", CPU)(tensors(images)) - expected).abs().max() < 1e-6
    assert (ClipImages("tiny-clip", str(published), CPU)(tensors(images)) - expected).abs().max() > 1e-3


def test_weights_of_the_other_gelu_are_refused(published):
    ClipImages("tiny-clip-quickgelu", "quick", CPU)
    with pytest.raises(ModelError, match="trained with QuickGELU: use 'tiny-clip-quickgelu'"):
        ClipImages("tiny-clip", "quick", CPU)
    with pytest.raises(ModelError, match="trained with plain GELU: use 'tiny-clip'"):
        ClipImages("tiny-clip-quickgelu", "plain", CPU)
    ClipImages("tiny-clip-quickgelu", str(published), CPU)  # a file alone does not tell
    (published.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, "quick_gelu": False}}))
    with pytest.raises(ModelError, match="trained with plain GELU: use 'tiny-clip'"):
        ClipImages("tiny-clip-quickgelu", str(published), CPU)
    for model, tag in open_clip.list_pretrained():  # of all tags that there are, the named model exists
        quick = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
        config = open_clip.get_model_config(model)
        if quick != config.get("quick_gelu", False) and "hf_model_name" not in config["text_cfg"]:
            other = model + "-quickgelu" if quick else model.removesuffix("-quickgelu")
            assert open_clip.get_model_config(other).get("quick_gelu", False) == quick, (model, tag)


def test_what_cannot_be_loaded_is_refused_in_one_line(published, folder, tmp_path):
    (folder / "cut.safetensors").write_bytes(published.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
    torch.save({"weight": Path("x")}, folder / "objects.pt")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "open_clip_config.json", bare)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "open_clip_config.json").write_text("{}")
    for model, weights, message in (
        ("tiny-clip", "absent", "run `hf download no/one`"),
        ("tiny-clip", "other", r"neither a file nor a tag of its weights \(plain, quick, absent\)"),
        ("tiny-clip", "", "neither a file nor a tag"),
        ("ViT-B-23", "openai", "unknown to open_clip: use ViT-B-32"),
        ("hf-hub:someone/tiny", "", "would be downloaded"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", "text network comes from the hub"),
        (f"local-dir:{folder}", "openai", "leave 'openai' out"),
        (f"local-dir:{bare}", "", "[Rr]equired pretrained weights"),
        (f"local-dir:{broken}", "", "open_clip_config.json"),
        (f"local-dir:{tmp_path / 'none'}", "", "open_clip_config.json"),
        ("tiny-clip", str(folder / "cut.safetensors"), "cut.safetensors: cannot be read"),
        ("tiny-clip", str(folder / "other.pt"), "other.pt: cannot be read"),
        ("tiny-clip", str(folder / "objects.pt"), "objects.pt: .* can run code"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            ClipImages(model, weights, CPU)
        assert "\n" not in str(caught.value), message
    with pytest.raises(ModelError, match="tokenizer .* is on the hub"):
        ClipScore("ViT-B-16-SigLIP", "webli", CPU)
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") is None  # it would let pickles run


def test_a_tags_weights_elsewhere(published, folder, tmp_path):
    """They keep the tag's preprocessing and its kind of GELU, which the file alone does not tell."""
    other = shutil.copy(published, tmp_path / "elsewhere.safetensors")
    images = tensors(pictures((64, 40), (50, 50)))
    here = ClipImages("tiny-clip", "plain", CPU)(images)
    assert torch.equal(ClipImages("tiny-clip", "plain", CPU, other)(images), here)
    assert not torch.equal(ClipImages("tiny-clip", str(other), CPU)(images), here)
    with pytest.raises(ModelError, match="QuickGELU"):
        ClipImages("tiny-clip", "quick", CPU, other)
