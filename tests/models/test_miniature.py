"""The miniature folder in plain diffusers, and whether its frozen random text encoders carry the digit's word."""

from itertools import combinations

import pytest
import torch
from diffusers import DiffusionPipeline

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


def test_saved_folder_runs_in_plain_diffusers(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.config.sample_size * loaded.vae_scale_factor == 8
    assert len(loaded.tokenizer) == len(loaded.tokenizer_2) == 49408
    assert (loaded.tokenizer.pad_token, loaded.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    images = loaded("a handwritten seven", num_inference_steps=2, guidance_scale=1.5, output_type="np").images
    assert images.shape == (1, 8, 8, 3)
