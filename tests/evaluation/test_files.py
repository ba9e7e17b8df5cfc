"""Files of an evaluation: rows that several jobs write, and images that are kept for other tools."""

import json
from concurrent.futures import ThreadPoolExecutor

import torch
from torchvision.io import read_image

from data.prompts import Prompt
from data.shard_dataset import ShardDataset
from trainer.distributed.world import World
from trainer.evaluation.keep import keeper
from trainer.evaluation.rows import Rows

ALONE = World(0, 1, 0, torch.device("cpu"))
PROMPTS = [Prompt(f"prompt {i}", f"{i:05d}", {"tag": "single_object", "include": [i]}) for i in range(3)]


def test_layouts_of_kept_images(tmp_path):
    images = [torch.full((3, 4, 6), 20 * i, dtype=torch.uint8) for i in range(12)]
    keeper("geneval", tmp_path / "geneval", PROMPTS, 4)(0, list(range(12)), images)
    assert json.loads((tmp_path / "geneval/00002/metadata.jsonl").read_text()) == PROMPTS[2].meta
    assert torch.equal(read_image(str(tmp_path / "geneval/00002/samples/00001.png")), images[9])
    keeper("dpg", tmp_path / "dpg", PROMPTS, 4)(0, list(range(12)), images)
    grid = read_image(str(tmp_path / "dpg/00001.png"))
    assert grid.shape == (3, 8, 12)
    corners = [grid[0, y, x].item() for y in (0, 7) for x in (0, 11)]
    assert corners == [80, 100, 120, 140]  # top left, top right, bottom left, bottom right
    keeper("shards", tmp_path / "shards", PROMPTS, 4)(1, list(range(8, 12)), images[8:])
    dataset = ShardDataset([tmp_path / "shards/images-000001.tar"], 4)
    assert dataset.read_text(0)["caption"] == "prompt 2" and len(dataset) == 4


def test_two_jobs_may_fill_one_cache(tmp_path):
    """Both write every chunk, at the same time; none disturbs the other."""

    def job(_: int) -> torch.Tensor:
        rows = Rows.shared(tmp_path / "cache", 400, 4)
        for number in rows.missing(ALONE):
            rows.write(number, {"a": torch.arange(4.0)[:, None] + 4 * number})
        return rows.read("a")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(job, range(8)))
    assert all(torch.equal(rows[:, 0], torch.arange(400.0)) for rows in found)
