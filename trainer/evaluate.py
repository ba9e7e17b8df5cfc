"""`disback evaluate`: how near the generated images are to real ones, and to what was asked for."""

import json
import shutil
import sys
import time
from dataclasses import dataclass

import torch
import yaml
from torch import Tensor
from torchvision.io import write_png
from torchvision.utils import make_grid

from models.metrics import Moments, frechet_distance, kernel_distance, precision_recall
from models.pipeline import replace_folder
from trainer.checkpoint.directory import WEIGHTS
from trainer.distributed.logs import log
from trainer.distributed.world import barrier, from_main, gather_rows, sum_over_ranks
from trainer.entry import run_verb
from trainer.evaluation.features import JUDGES, Judge, to_bytes
from trainer.evaluation.sources import Source, find_source
from trainer.training.run import Run
from trainer.training.stage import enlarge

KEYS = "fid patch_fid kid precision recall clip_score class_accuracy images seed features reference checkpoint".split()
GRID = 60


@dataclass
class Reference:
    """Real images as the judge sees them, and the captions (and classes) that images are made for."""

    name: str
    features: Tensor
    captions: list[str]
    classes: list[int | None]


def real_images(run: Run, judge: Judge) -> Reference:
    """Features of the held-out shards, over all ranks."""
    dataset = run.dataset("heldout", ("image", "caption", "meta"))
    mine, size = [], run.settings.evaluate.batch
    rows = list(range(run.world.rank, len(dataset), run.world.size))
    for first in range(0, len(rows), size):
        images = torch.stack([dataset.read(row)["image"] for row in rows[first : first + size]])
        mine.append(judge(to_bytes(images).to(run.world.device))[0])
    samples = [dataset.read_text(row) for row in range(len(dataset))]
    name, classes = str(run.settings.data.heldout), [s["meta"].get("class") for s in samples]
    return Reference(name, gather_rows(torch.cat(mine), run.world), [s["caption"] for s in samples], classes)


def evaluate_one(run: Run, source: Source, judge: Judge, reference: Reference) -> dict:
    """Makes the images, scores them, writes eval/<what>/; returns the metrics. Every rank calls it."""
    settings, began = run.settings.evaluate, time.monotonic()
    maker = source.open(run)
    mine = list(range(run.world.rank, settings.images, run.world.size))
    features, correct, shown = [], torch.zeros(1, dtype=torch.float64, device=run.world.device), []
    for first in range(0, len(mine), settings.batch):
        part = mine[first : first + settings.batch]
        asked = [i % len(reference.captions) for i in part]
        images = maker.images([reference.captions[i] for i in asked], settings.seed, part)
        found, logits = judge(images)
        features.append(found)
        if judge.classes:
            classes = torch.tensor([reference.classes[i] for i in asked], device=logits.device)
            correct += (logits.argmax(1) == classes).double().sum()
        shown += list(images[: GRID - len(shown)].cpu()) if run.world.main and len(shown) < GRID else []
        done = min(first + settings.batch, len(mine)) * run.world.size
        spent = time.monotonic() - began
        if first // settings.batch % 4 == 3 or done >= settings.images:
            left = spent / done * max(settings.images - done, 0)
            log.info(f"evaluate {source.name}: {min(done, settings.images)}/{settings.images} images, ETA {left:.0f} s")
    features = torch.cat(features)
    moments = Moments(sum_over_ranks(Moments.of(features).stack, run.world), features.shape[1])
    everything = gather_rows(features, run.world)
    precision, recall = precision_recall(everything, reference.features)
    record = dict.fromkeys(KEYS) | {
        "fid": frechet_distance(moments, Moments.of(reference.features)),
        "kid": kernel_distance(everything, reference.features),
        "precision": precision,
        "recall": recall,
        "images": settings.images,
        "seed": settings.seed,
        "features": judge.name,
        "reference": f"{reference.name} ({len(reference.features)} images)",
        "checkpoint": str(source.weights),
    }
    if judge.classes:
        record["class_accuracy"] = float(sum_over_ranks(correct, run.world)) / settings.images
    if run.world.main:
        _write(run, source, record, shown)
    barrier(run.world)
    return record


def _write(run: Run, source: Source, record: dict, shown: list[Tensor]) -> None:
    folder = run.folder / "eval" / source.name
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sample = run.settings.sample
    write_png(make_grid(enlarge(torch.stack(shown), sample.enlarge), 10, 2, pad_value=128), str(temporary / "grid.png"))
    used = {
        "evaluate": run.settings.evaluate.model_dump(),
        "sampling_steps": len(source.timesteps) if source.timesteps else sample.steps,
    }
    used["guidance_scale"] = None if source.timesteps else sample.guidance_scale
    (temporary / "settings.yaml").write_text(yaml.safe_dump(used, sort_keys=False))
    (temporary / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    replace_folder(temporary, folder)
    shares = ", ".join(f"{k} {record[k]:.4g}" for k in KEYS if isinstance(record[k], float))
    log.info(f"evaluate {source.name}: {shares} -> {folder}")


def _unseen(run: Run) -> list[str]:
    """Checkpoints of the run that have weights and no metrics yet, oldest first."""
    weights = sorted((run.folder / "backtrack" / "checkpoints").glob(f"step-????????/{WEIGHTS}"))
    return [p.parent.name for p in weights if not (run.folder / "eval" / p.parent.name / "metrics.json").exists()]


def evaluate(run: Run) -> None:
    """Evaluates what `evaluate.what` names; with `evaluate.watch` also every checkpoint, as they come, until the run's
    generator is written."""
    run.stage_folder("eval", training=False)
    settings = run.settings.evaluate
    judge = JUDGES[settings.features](run)
    reference = real_images(run, judge)
    while settings.watch:
        finished = from_main((run.folder / "generator" / "model_index.json").exists(), run.world)
        for name in from_main(_unseen(run), run.world):
            evaluate_one(run, find_source(run, name), judge, reference)
        if finished:
            break
        time.sleep(settings.poll_seconds)
    for what in [settings.what] if isinstance(settings.what, str) else settings.what:
        evaluate_one(run, find_source(run, what), judge, reference)


def main(argv: list[str] | None = None) -> int:
    flags = {"--watch": ("evaluate.watch", ""), "--checkpoint": ("evaluate.what", "WHAT")}
    return run_verb("evaluate", "Scores a generator against held-out real images.", evaluate, argv, flags)


if __name__ == "__main__":
    sys.exit(main())
