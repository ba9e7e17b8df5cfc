"""Pipelines with random weights and shards of placeholder images, for benchmarks: no hub, no data set."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torchvision.io import encode_png

from data.shard_writer import write_shards
from models.architecture import FACTS, TEXT_ENCODERS
from models.files import read_json
from models.tokenizer import clip_tokenizer

# SDXL's topology (three levels; 0, 2 and 10 transformer layers; text_time conditioning) at a twentieth of its widths.
SMALL = {
    "unet": {
        "block_out_channels": [16, 32, 64], "attention_head_dim": [1, 2, 4], "cross_attention_dim": 64,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8, "norm_num_groups": 8,
    },
    "vae": {"block_out_channels": [16, 16, 16, 16], "norm_num_groups": 8},
    "text": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 32,
    },
}  # fmt: skip


def write_captions(folder: Path, resolution: int, count: int = 64) -> None:
    """A shard of `count` captions, each with a grey square image."""
    grey = encode_png(torch.full((3, resolution, resolution), 128, dtype=torch.uint8)).numpy().tobytes()
    samples = ({"__key__": f"{i:04d}", "txt": f"caption number {i}", "png": grey} for i in range(count))
    write_shards(samples, folder, "train")


def write_sdxl(folder: Path, small: bool, device: torch.device) -> int:
    """SDXL base 1.0's pipeline in bfloat16, as the package knows it, with random weights; returns the UNet's number of
    parameters. device: where the weights are drawn."""
    facts = FACTS / "sdxl"
    unet, vae, one, two, scheduler = (
        read_json(facts / f"{name}.json") for name in ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
    )
    if small:
        unet, vae, one, two = unet | SMALL["unet"], vae | SMALL["vae"], one | SMALL["text"], two | SMALL["text"]
    torch.manual_seed(0)
    encoders = []
    with torch.device(device):
        denoiser, decoder = UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)
        for config in (one, two):
            kind, settings = TEXT_ENCODERS[config["architectures"][0]]
            encoders.append(kind(settings.from_dict(config)))
    length = one["max_position_embeddings"]
    StableDiffusionXLPipeline(
        unet=denoiser.to(torch.bfloat16),
        vae=decoder,
        text_encoder=encoders[0].to(torch.bfloat16),
        text_encoder_2=encoders[1].to(torch.bfloat16),
        tokenizer=clip_tokenizer(length),
        tokenizer_2=clip_tokenizer(length, pad_token="!"),
        scheduler=DDIMScheduler.from_config(scheduler),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return sum(p.numel() for p in denoiser.parameters())
