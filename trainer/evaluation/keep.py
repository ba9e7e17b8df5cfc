"""Keeps generated images on disk, in the layouts that other tools read."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import encode_png, write_png

from data.prompts import Prompt
from data.shard_writer import write_shard
from models.scorers.preprocess import over_threads
from trainer.errors import UserError

Keep = Callable[[int, list[int], list[Tensor]], None]
TILES = 4  # images per prompt in DPG-Bench: a grid of 2 x 2


def check_layout(layout: str, prompts: list[Prompt], per_prompt: int) -> None:
    """Raises UserError for prompts that a layout cannot hold."""
    if layout == "dpg" and per_prompt not in (1, TILES):
        raise UserError(
            f"evaluate.keep=dpg: DPG-Bench reads 1 or {TILES} images per prompt: set evaluate.images_per_prompt={TILES}"
        )
    if layout == "dpg" and (bad := next((p.id for p in prompts if "." in p.id or "/" in p.id), None)):
        raise UserError(f"evaluate.keep=dpg: the prompt's name {bad!r} has a dot or slash, which DPG-Bench cuts it at")
    if layout == "geneval" and any("include" not in prompt.meta for prompt in prompts):
        raise UserError(
            "evaluate.keep=geneval: the prompts have no GenEval metadata: use its evaluation_metadata.jsonl as "
            "evaluate.prompts"
        )


def keeper(layout: str, folder: Path, prompts: list[Prompt], per_prompt: int) -> Keep:
    """A function (chunk, numbers, images) that writes a chunk's images below a folder. Image i belongs to prompt
    i // per_prompt.

    "shards": images-000000.tar and so on, one per chunk. "folder": 00000000.png beside 00000000.txt. "geneval":
    00000/samples/00000.png beside 00000/metadata.jsonl. "dpg": ID.png, a 2 x 2 grid of a prompt's images.
    """
    write = {"shards": _shards, "folder": _folder, "geneval": _geneval, "dpg": _dpg}[layout]

    def keep(chunk: int, numbers: list[int], images: list[Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, chunk, numbers, images, prompts, per_prompt)

    return keep


def prompt_of(prompts: list[Prompt], number: int, per_prompt: int) -> Prompt:
    """The prompt of an image; with more images than prompts, they come again from the first one on."""
    return prompts[number // per_prompt % len(prompts)]


def _png(image: Tensor) -> bytes:
    return encode_png(image).numpy().tobytes()


def _shards(
    folder: Path, chunk: int, numbers: list[int], images: list[Tensor], prompts: list[Prompt], per_prompt: int
) -> None:
    samples = []
    for number, png in zip(numbers, over_threads(_png, images), strict=True):
        prompt = prompt_of(prompts, number, per_prompt)
        about = {"prompt_id": prompt.id, **prompt.meta}
        samples.append({"__key__": f"{number:08d}", "png": png, "txt": prompt.text, "json": about})
    write_shard(samples, folder / f"images-{chunk:06d}.tar")


def _folder(
    folder: Path, chunk: int, numbers: list[int], images: list[Tensor], prompts: list[Prompt], per_prompt: int
) -> None:
    for number, png in zip(numbers, over_threads(_png, images), strict=True):
        (folder / f"{number:08d}.txt").write_text(prompt_of(prompts, number, per_prompt).text + "\n", encoding="utf-8")
        (folder / f"{number:08d}.png").write_bytes(png)


def _geneval(
    folder: Path, chunk: int, numbers: list[int], images: list[Tensor], prompts: list[Prompt], per_prompt: int
) -> None:
    for number, png in zip(numbers, over_threads(_png, images), strict=True):
        place, again = divmod(number, per_prompt)
        own = folder / f"{place:05d}"
        (own / "samples").mkdir(parents=True, exist_ok=True)
        (own / "metadata.jsonl").write_text(json.dumps(prompt_of(prompts, number, per_prompt).meta) + "\n")
        (own / "samples" / f"{again:05d}.png").write_bytes(png)


def _dpg(
    folder: Path, chunk: int, numbers: list[int], images: list[Tensor], prompts: list[Prompt], per_prompt: int
) -> None:
    for first in range(0, len(images), per_prompt):
        tiles = images[first : first + per_prompt]
        if per_prompt == TILES:
            tiles = [torch.cat([torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)], 1)]
        write_png(tiles[0], str(folder / f"{prompt_of(prompts, numbers[first], per_prompt).id}.png"))
