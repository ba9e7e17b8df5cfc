"""`disback evaluate`: how close generated images are to real ones and to their captions."""

import json
import shutil
import time
from dataclasses import dataclass

import torch
import yaml
from torch import Tensor
from torchvision.io import write_png

from models.image_metrics import Moments, frechet_distance, kernel_distance, precision_recall
from models.pipeline import replace_folder
from trainer.checkpoint.directory import CheckpointDirectory
from trainer.distributed.logs import log
from trainer.distributed.world import barrier, from_main, gather_rows, sum_over_ranks
from trainer.entry import exit_with, run_verb
from trainer.evaluation.features import FEATURES, FeatureNetwork, to_bytes
from trainer.evaluation.sources import Source, find_source
from trainer.training.preview import grid
from trainer.training.run import Run

KEYS = "fid patch_fid kid precision recall clip_score class_accuracy images seed features reference checkpoint".split()
GRID = 60


@dataclass
class Reference:
    """The held-out images: their features over all ranks, and the captions (and classes) to generate images for."""

    name: str
    features: Tensor
    captions: list[str]
    classes: list[int | None]


@dataclass
class Generated:
    """This rank's part of the generated images. correct: how many have their caption's class. shown: for the grid."""

    features: Tensor
    correct: Tensor
    shown: list[Tensor]


def real_images(run: Run, network: FeatureNetwork) -> Reference:
    """The held-out shards; every rank reads its part of the images."""
    dataset = run.dataset("heldout", ("image", "caption", "meta"))
    mine, size = [], run.settings.evaluate.batch
    rows = list(range(run.world.rank, len(dataset), run.world.size))
    for first in range(0, len(rows), size):
        images = torch.stack([dataset.read(row)["image"] for row in rows[first : first + size]])
        mine.append(network(to_bytes(images).to(run.world.device))[0])
    samples = [dataset.read_text(row) for row in range(len(dataset))]
    name, classes = str(run.settings.data.heldout), [s["meta"].get("class") for s in samples]
    return Reference(name, gather_rows(torch.cat(mine), run.world), [s["caption"] for s in samples], classes)


def generate(run: Run, source: Source, network: FeatureNetwork, reference: Reference) -> Generated:
    """Generates this rank's images, cycling through the held-out captions."""
    settings, world, began = run.settings.evaluate, run.world, time.monotonic()
    opened = source.open(run)
    mine = list(range(world.rank, settings.images, world.size))
    features, correct, shown = [], torch.zeros(1, dtype=torch.float64, device=world.device), []
    for first in range(0, len(mine), settings.batch):
        part = mine[first : first + settings.batch]
        rows = [i % len(reference.captions) for i in part]
        images = opened.images([reference.captions[i] for i in rows], settings.seed, part)
        found, logits = network(images)
        features.append(found)
        if network.classes:
            classes = torch.tensor([reference.classes[i] for i in rows], device=logits.device)
            correct += (logits.argmax(1) == classes).double().sum()
        if world.main:
            shown += images[: GRID - len(shown)].cpu()
        done = min((first + settings.batch) * world.size, settings.images)
        if first // settings.batch % 4 == 3 or done == settings.images:
            left = (time.monotonic() - began) / done * (settings.images - done)
            log.info(f"evaluate {source.name}: {done}/{settings.images} images, ETA {left:.0f} s")
    return Generated(torch.cat(features), correct, shown)


def evaluate_one(run: Run, source: Source, network: FeatureNetwork, reference: Reference) -> dict:
    """Generates images, scores them and writes eval/<what>/; returns the metrics. Every rank must call it."""
    settings, world = run.settings.evaluate, run.world
    made = generate(run, source, network, reference)
    moments = Moments(sum_over_ranks(Moments.of(made.features).stack, world), made.features.shape[1])
    features = gather_rows(made.features, world)
    precision, recall = precision_recall(features, reference.features)
    record = dict.fromkeys(KEYS) | {
        "fid": frechet_distance(moments, Moments.of(reference.features)),
        "kid": kernel_distance(features, reference.features),
        "precision": precision,
        "recall": recall,
        "images": settings.images,
        "seed": settings.seed,
        "features": network.name,
        "reference": f"{reference.name} ({len(reference.features)} images)",
        "checkpoint": str(source.weights),
    }
    if network.classes:
        record["class_accuracy"] = float(sum_over_ranks(made.correct, world)) / settings.images
    if world.main:
        _write(run, source, record, made.shown)
    barrier(world)
    return record


def _write(run: Run, source: Source, record: dict, shown: list[Tensor]) -> None:
    folder = run.folder / "eval" / source.name
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sample = run.settings.sample
    write_png(grid(torch.stack(shown), sample.enlarge, columns=10), str(temporary / "grid.png"))
    used = {
        "evaluate": run.settings.evaluate.model_dump(),
        "sampling_steps": len(source.timesteps) if source.timesteps else sample.steps,
        "guidance_scale": None if source.timesteps else sample.guidance_scale,
    }
    (temporary / "settings.yaml").write_text(yaml.safe_dump(used, sort_keys=False))
    (temporary / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    replace_folder(temporary, folder)
    scores = ", ".join(f"{k} {record[k]:.4g}" for k in KEYS if isinstance(record[k], float))
    log.info(f"evaluate {source.name}: {scores} -> {folder}")


def _not_evaluated(run: Run) -> list[str]:
    """Checkpoints that have weights but no metrics yet, oldest first."""
    names = CheckpointDirectory(run.folder / "backtrack").with_weights()
    return [name for name in names if not (run.folder / "eval" / name / "metrics.json").exists()]


def evaluate(run: Run) -> None:
    """Evaluates what `evaluate.what` names. With `evaluate.watch` it first evaluates each checkpoint as it appears, until
    the run's generator is written."""
    run.stage_folder("eval", training=False)
    settings = run.settings.evaluate
    network = FEATURES[settings.features](run)
    reference = real_images(run, network)
    while settings.watch:
        finished = from_main((run.folder / "generator" / "model_index.json").exists(), run.world)
        for name in from_main(_not_evaluated(run), run.world):
            evaluate_one(run, find_source(run, name), network, reference)
        if finished:
            break
        time.sleep(settings.poll_seconds)
    for what in [settings.what] if isinstance(settings.what, str) else settings.what:
        evaluate_one(run, find_source(run, what), network, reference)


def main(argv: list[str] | None = None) -> int:
    flags = {"--watch": ("evaluate.watch", ""), "--checkpoint": ("evaluate.what", "WHAT")}
    return run_verb("evaluate", "Scores a generator against held-out real images.", evaluate, argv, flags)


if __name__ == "__main__":
    exit_with(main)
