"""Pipeline folders: tokenizer, miniature, strict loads, decoding in pieces, hashes."""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from data.digits import PHRASINGS, caption
from models.errors import ModelError
from models.generator_pipeline import one_step_scheduler
from models.miniature import build_miniature
from models.pipeline import load_network, weights_hash
from models.sampler import Sampler
from models.settings import MiniatureSettings
from models.tokenizer import clip_tokenizer
from models.validate import check_pipeline
from trainer.engine.save_weights import Snapshot
from trainer.engine.weight_slices import Weights

TEXTS = ["a handwritten seven", "It's   the DIGIT 7!", "naïve café 北京", "x" * 40, ""]


def test_tokenizer_is_clips():
    import open_clip

    theirs = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    ours = clip_tokenizer(77)(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    for mine, other in zip(ours, theirs, strict=True):
        length = int((other == 49407).nonzero()[0]) + 1
        assert mine[:length].tolist() == other[:length].tolist()
    padded = clip_tokenizer(8, "!")(["a"], padding="max_length").input_ids[0]
    assert padded == [49406, 320, 49407, 0, 0, 0, 0, 0]


def test_miniature_is_a_function_of_its_settings():
    state = torch.get_rng_state()
    one, two, other = (build_miniature(MiniatureSettings(seed=s)).unet.state_dict() for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_captions_of_different_digits_lie_apart():
    """The random, frozen encoders must tell the digits apart in every phrasing, in states and pooled text alike."""
    pipeline = build_miniature(MiniatureSettings())
    states, pooled = [], []
    for phrasing in range(len(PHRASINGS)):
        texts = [caption(digit, phrasing) for digit in range(10)]
        with torch.no_grad():
            s, _, p, _ = pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
        states.append(s.flatten(1)), pooled.append(p)
    for values in (states, pooled):
        typical = float(torch.cat(values).std())
        assert 0.3 < typical < 3  # of order one: what the UNet works with
        for within in values:
            gaps = torch.cdist(within, within) / within.shape[1] ** 0.5
            assert float(gaps[~torch.eye(10, dtype=bool)].min()) > 0.05 * typical


def test_strict_loading(root, world, tmp_path):
    source = root / "base" / "pipeline" / "unet"
    load_network(source)
    state = load_file(source / "diffusion_pytorch_model.safetensors")

    def broken(change) -> str:
        folder = tmp_path / change.__name__
        shutil.copytree(source, folder)
        altered = dict(state)
        change(altered)
        save_file(altered, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return folder

    def missing(s):
        del s["conv_in.weight"]

    def unexpected(s):
        s["fake_unet.conv_in.weight"] = torch.zeros(1)

    def shape(s):
        s["conv_in.bias"] = torch.zeros(3)

    for change in (missing, unexpected, shape):
        folder = broken(change)
        with pytest.raises(ModelError, match=str(folder)):
            load_network(folder)
        unet = load_network(source)
        with pytest.raises(ModelError, match=str(folder)):
            Weights(unet, world).read(folder)
        assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    (tmp_path / "missing" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError):
        load_network(tmp_path / "missing")


def test_many_images_are_decoded_in_pieces(root, monkeypatch):
    sampler = Sampler.load(root / "base" / "pipeline", (8, 8), torch.float32, torch.device("cpu"))
    latents, images = torch.randn(5, *sampler.latent_shape), torch.rand(5, 3, 8, 8) * 2 - 1
    whole = sampler.decode(latents), *sampler.posterior(images)
    monkeypatch.setattr("models.sampler.VAE_PIXELS", 2 * 8**2)
    parts = sampler.decode(latents), *sampler.posterior(images)
    assert (whole[0].int() - parts[0].int()).abs().max() <= 1  # a byte may be cut off either way
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole[1:], parts[1:], strict=True))


def test_incomplete_pipelines_are_refused(root, tmp_path):
    shutil.copytree(root / "base" / "pipeline", tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "text_encoder_2")
    with pytest.raises(ModelError, match=r"text_encoder_2/config.json is missing"):
        check_pipeline(tmp_path / "p")


def test_saved_folders_load_in_diffusers_and_hash_alike(root, tmp_path):
    unet = load_network(root / "base" / "pipeline" / "unet")
    Snapshot.of_network(unet.state_dict(), dict(unet.config)).write(tmp_path / "u")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "u")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in unet.state_dict().items())
    assert dict(again.config)["block_out_channels"] == dict(unet.config)["block_out_channels"]
    digest = weights_hash(tmp_path / "u")
    file = tmp_path / "u" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert weights_hash(tmp_path / "u") != digest


def test_scheduler_takes_one_step_from_the_conditioning_timestep(root):
    scheduler = one_step_scheduler(root / "base" / "pipeline", 399)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [399] and scheduler.init_noise_sigma == 1.0
