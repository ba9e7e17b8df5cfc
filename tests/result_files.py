"""Run folders as training and evaluation leave them, with made-up numbers: for tests of what reads results."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from trainer.checkpoint.directory import step_name

PROMPTS = ["a fox on a light blue background", "a rocket on a purple background", "a crown on a yellow background"]
HELDOUT = {"protocol": "heldout", "protocol_hash": "a1b2c3d4e5f6"}
COCO = {"protocol": "dmd2-coco10k", "protocol_hash": "0f1e2d3c4b5a"}
SOURCES = {"teacher": 1.2, "start": 90.0, "generator": 3.0}


def write_lines(file: Path, *lines: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def draw(file: Path, columns: int, rows: int = 1, side: int = 16, seed: int = 0) -> None:
    """A PNG file of coloured discs in a grid."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:side, :side] / side - 0.5
    disc, grid = (x**2 + y**2 < 0.1)[..., None], np.empty((rows * side, columns * side, 3), dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            colours = rng.integers(0, 255, (2, 3))
            grid[row * side : (row + 1) * side, column * side : (column + 1) * side] = np.where(disc, *colours)
    Image.fromarray(grid).save(file)


def scores(fid: float, **more: object) -> dict:
    """An evaluation with the demo's scores, each a function of FID."""
    return {
        "fid": fid,
        "kid": fid / 100,
        "pixel_fd": 10 + fid,
        "precision": 0.8,
        "recall": 0.7,
        "class_accuracy": 1 / (1 + fid / 10),
        "images": 64,
        "features": "classifier, held-out accuracy 0.99",
        "reference": "held-out images",
        "credit": "somebody <b>",
        "weights": "ema",
        **HELDOUT,
        **more,
    }


def write_scores(run: Path, what: str, found: dict, folder: str = "eval", prompts: list[str] = PROMPTS) -> None:
    """An evaluation's folder, with its grid and its images of prompts."""
    place = run / folder / what
    write_lines(place / "metrics.json", found)
    draw(place / "grid.png", 6, 4, seed=len(what))
    draw(place / "prompts.png", len(prompts), seed=len(what) + 1)
    steps = 25 if what == "teacher" else 1
    evaluate = {"what": what, "images": found.get("images"), "features": "emoji", "protocol": found.get("protocol")}
    about = {"evaluate": evaluate, "sampling_steps": steps, "guidance_scale": None, "prompts": prompts}
    (place / "settings.yaml").write_text(yaml.safe_dump(about))


def make_run(
    folder: Path,
    kind: str = "walk",
    last: int = 100,
    seed: int = 0,
    shift: float = 0.0,
    protocol: dict = HELDOUT,
    prompts: list[str] = PROMPTS,
    more: dict | None = None,
    **config: object,
) -> Path:
    """A run of backtracking with an evaluation, averaged and raw, every 20 steps. shift: what its FID is higher by. more:
    further keys of each metrics.json. config: settings that differ."""
    settings = {
        "about": {"disback": "0", "world_size": 2},
        "run": str(folder),
        "seed": seed,
        "path": "",
        "pipeline": "",
        "backtrack": {"path": kind, "fake_updates": 5, "batch": 32, "steps": last},
        "sample": {"steps": 25, "prompts": prompts},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config))
    lines = [
        {
            "step": step,
            "time": 36.0 * step,
            "compute": 9.0 * step,
            "gpu_hours": 0.02 * step,
            "mismatch": math.exp(-step / 50) * (1 + shift / 9),
            "target_node": max(2 - step // 25, 0),
            "loss/fake_score": 1 / (1 + step / 50),
            "grad_norm/generator": 1 + step % 3 if step % 20 else None,
        }
        for step in range(5, last + 1, 5)
    ]
    write_lines(folder / "backtrack" / "metrics.jsonl", *lines)
    with (folder / "backtrack" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 105, "ti')  # being written
    for step in range(20, last + 1, 20):
        fid, numbers = 3.0 + 60 * math.exp(-step / 20) + shift, protocol | (more or {})
        write_scores(folder, step_name(step), scores(fid, **numbers), prompts=prompts)
        write_scores(folder, f"{step_name(step)}-raw", scores(1.3 * fid, weights="raw", **numbers), prompts=prompts)
        draw(folder / "backtrack" / "samples" / f"{step_name(step)}.png", 6, 2, seed=step)
    write_scores(folder, "generator", scores(3.0 + shift, **protocol, **(more or {})), prompts=prompts)
    return folder


def add_teacher(run: Path, prompts: list[str] = PROMPTS, **more: object) -> None:
    """What pretraining, recording and the evaluation of teacher and start leave."""
    for what in ("teacher", "start"):
        write_scores(run, what, scores(SOURCES[what], **more), prompts=prompts)
    teacher = [{"step": s, "time": 70.0 * s, "compute": 3.0 * s, "loss/teacher": 1 / s} for s in range(1, 11)]
    write_lines(run / "pretrain" / "metrics.jsonl", *teacher)
    record = [
        {
            "step": s,
            "time": 36.0 * s,
            "compute": 10.0 * s,
            "gpu_hours": 0.02 * s,
            "distance": s / 100,
            "loss/fake_score": 1.0,
        }
        for s in range(1, 21)
    ]
    write_lines(run / "record" / "metrics.jsonl", *record)
    nodes = [
        {
            "index": i,
            "step": 10 * i,
            "file": f"node-{i:04d}/weights.safetensors",
            "sha256": "0" * 64,
            "bytes": 16_500_000,
            "distance_to_node_0": 0.1 * i,
            "distance_to_neighbour": 0.1 * bool(i),
        }
        for i in range(3)
    ]
    write_lines(run / "path" / "path.json", {"nodes": nodes})
    for i in range(3):
        draw(run / "eval" / "nodes" / f"node-{i:04d}.png", 8, seed=i)


def copy_without(run: Path, folder: Path, *keys: str) -> Path:
    """A copy of a run whose metrics lack keys, as those of earlier versions do."""
    shutil.copytree(run, folder)
    for file in [*folder.rglob("metrics.json"), *folder.rglob("metrics.jsonl")]:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        write_lines(file, *({key: value for key, value in line.items() if key not in keys} for line in lines))
    return folder
