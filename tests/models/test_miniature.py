"""The miniature folder in plain diffusers, and whether its frozen random text encoders carry the digit's word."""

from itertools import combinations

import pytest
import torch
from diffusers import DiffusionPipeline

from data import emoji
from data.digits import PHRASINGS, caption
from models.miniature import build_miniature
from models.settings import MiniatureSettings


@pytest.fixture(scope="module")
def pipeline():
    return build_miniature(MiniatureSettings())


@pytest.mark.parametrize("kind", ["states", "pooled"])
def test_a_digit_is_known_in_phrasings_that_were_not_seen(pipeline, kind):
    """Class means from four phrasings name the digits of the other two, once a phrasing's own mean is taken away: the
    word moves the text in the same direction wherever it stands."""
    rows = []
    for phrasing in range(len(PHRASINGS)):
        texts = [caption(digit, phrasing) for digit in range(10)]
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
        rows.append(states.mean(1) if kind == "states" else pooled)
    values = torch.stack(rows)  # [phrasing, digit, width]
    values = values - values.mean(1, keepdim=True)
    for unseen in combinations(range(len(PHRASINGS)), 2):
        seen = [p for p in range(len(PHRASINGS)) if p not in unseen]
        means = values[seen].mean(0)
        nearest = torch.cdist(values[list(unseen)].flatten(0, 1), means).argmin(1)
        assert float((nearest == torch.arange(10).repeat(2)).float().mean()) >= 0.9


@pytest.mark.parametrize("vae, unet", [((16,), (16, 32)), ((16, 16, 32), (16, 32)), ((16, 16), (16, 32, 32))])
def test_any_number_of_levels(vae, unet):
    settings = MiniatureSettings(resolution=16, vae_channels=vae, unet_channels=unet, latent_channels=6)
    pipe = build_miniature(settings)
    with torch.no_grad():
        latents = pipe.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean
        assert latents.shape == (1, 6, settings.latent_side, settings.latent_side)
        assert pipe.vae.decode(latents).sample.shape == (1, 3, 16, 16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a seven", num_inference_steps=1, guidance_scale=0.0, output_type="np").images.shape == (1, 16, 16, 3)


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="resolution=12 is not a multiple of 8"):
        MiniatureSettings(resolution=12, vae_channels=(8, 8, 8), unet_channels=(8, 8))
    with pytest.raises(ValueError, match="multiples of 8"):
        MiniatureSettings(unet_channels=(12, 32))


def test_captions_of_the_emoji_lie_apart():
    """As the digits' above: object and colour are known in a phrasing that was not seen."""
    pipeline = build_miniature(MiniatureSettings(text_widths=(64, 64), pooled=64))
    objects, colours = list(emoji.OBJECTS), list(emoji.COLOURS)
    rows = []
    for phrasing in range(len(emoji.PHRASINGS)):
        texts = [emoji.caption(o, c, phrasing) for o in objects for c in colours]
        with torch.no_grad():
            states = pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)[0]
        rows.append(states.mean(1).unflatten(0, (len(objects), len(colours))))
    values = torch.stack(rows)  # [phrasing, object, colour, width]
    values = values - values.mean((1, 2), keepdim=True)
    for unseen in range(len(rows)):
        others = values[[p for p in range(len(rows)) if p != unseen]].mean(0)
        for axis, count in ((1, len(objects)), (0, len(colours))):
            nearest = torch.cdist(values[unseen].mean(axis), others.mean(axis)).argmin(1)
            assert float((nearest == torch.arange(count)).float().mean()) >= 0.9


def test_saved_folder_runs_in_plain_diffusers(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.config.sample_size * loaded.vae_scale_factor == 8
    assert len(loaded.tokenizer) == len(loaded.tokenizer_2) == 49408
    assert (loaded.tokenizer.pad_token, loaded.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    images = loaded("a handwritten seven", num_inference_steps=2, guidance_scale=1.5, output_type="np").images
    assert images.shape == (1, 8, 8, 3)
