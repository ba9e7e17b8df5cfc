"""`disback evaluate`: how close generated images are to real ones and to their captions."""

import json
import shutil
import time
from dataclasses import dataclass

import torch
import yaml
from torch import Tensor
from torchvision.io import write_png

from models.image_metrics import Moments, PixelComponents, frechet_distance, kernel_distance, precision_recall
from models.pipeline import replace_folder
from trainer.checkpoint.directory import CheckpointDirectory
from trainer.distributed.logs import log
from trainer.distributed.world import World, barrier, from_main, gather_rows, sum_over_ranks
from trainer.entry import exit_with, run_verb
from trainer.errors import UserError
from trainer.evaluation.features import ClassifierFeatures, FeatureNetwork, as_shares, count_correct, to_bytes
from trainer.evaluation.sources import OpenSource, Source, find_source
from trainer.training.preview import grid
from trainer.training.run import Run

KEYS = (
    "fid patch_fid kid pixel_fd precision recall clip_score class_accuracy colour_accuracy heldout_class_accuracy "
    "heldout_colour_accuracy images seed features reference credit checkpoint"
).split()
GRID = 60


@dataclass
class Reference:
    """The held-out images: their features over all ranks, and the captions and .json to generate images for."""

    name: str
    features: Tensor
    components: PixelComponents
    pixels: Moments
    captions: list[str]
    metas: list[dict]

    @property
    def credit(self) -> str | None:
        """Whom the images are from, if their .json says so."""
        return "; ".join(sorted({str(meta["credit"]) for meta in self.metas if meta.get("credit")})[:3]) or None


@dataclass
class Generated:
    """This rank's part of the generated images. correct: as `count_correct`. shown: for the grid."""

    features: Tensor
    pixels: Tensor
    correct: dict[str, Tensor]
    shown: list[Tensor]


def real_images(run: Run, network: FeatureNetwork) -> Reference:
    """The held-out shards; every rank reads its part of the images."""
    dataset, world = run.dataset("heldout", ("image", "caption", "meta")), run.world
    if len(dataset) < max(2, world.size):
        raise UserError(f"data.heldout: {len(dataset)} samples are too few to compare with, for {world.size} processes")
    features, pixels, size = [], [], run.settings.evaluate.batch
    rows = list(range(world.rank, len(dataset), world.size))
    for first in range(0, len(rows), size):
        images = torch.stack([dataset.read(row)["image"] for row in rows[first : first + size]])
        images = to_bytes(images).to(world.device)
        features.append(network(images)[0])
        pixels.append(PixelComponents.pixels(images))
    samples = [dataset.read_text(row) for row in range(len(dataset))]
    pixels = gather_rows(torch.cat(pixels), world)
    # Of rank 0: other processors may find other signs and, for directions of equal variance, other bases.
    components = from_main(PixelComponents.fit(pixels.cpu()) if world.main else None, world).to(world.device)
    return Reference(
        str(run.settings.data.heldout),
        gather_rows(torch.cat(features), world),
        components,
        Moments.of(components.project(pixels)),
        [sample["caption"] for sample in samples],
        [sample["meta"] for sample in samples],
    )


def generate(run: Run, source: Source, opened: OpenSource, network: FeatureNetwork, reference: Reference) -> Generated:
    """Generates this rank's images, cycling through the held-out captions."""
    settings, world, began = run.settings.evaluate, run.world, time.monotonic()
    mine = list(range(world.rank, settings.images, world.size))
    features, pixels, metas, shown, found = [], [], [], [], {key: [] for key in network.labels.values()}
    for first in range(0, len(mine), settings.batch):
        part = mine[first : first + settings.batch]
        rows = [i % len(reference.captions) for i in part]
        images = opened.images([reference.captions[i] for i in rows], settings.seed, part)
        seen, classes = network(images)
        features.append(seen)
        pixels.append(reference.components(images))
        metas += [reference.metas[i] for i in rows]
        for key, numbers in classes.items():
            found[key].append(numbers)
        if world.main:
            shown += images[: GRID - len(shown)].cpu()
        done = min((first + settings.batch) * world.size, settings.images)
        if first // settings.batch % 4 == 3 or done == settings.images:
            left = (time.monotonic() - began) / done * (settings.images - done)
            log.info(f"evaluate {source.name}: {done}/{settings.images} images, ETA {left:.0f} s")
    correct = count_correct(network, {key: torch.cat(numbers) for key, numbers in found.items()}, metas)
    return Generated(torch.cat(features), torch.cat(pixels), correct, shown)


def evaluate_one(run: Run, source: Source, network: FeatureNetwork, reference: Reference) -> dict:
    """Generates images, scores them and writes eval/<what>/; returns the metrics. Every rank must call it."""
    settings, world = run.settings.evaluate, run.world
    opened = source.open(run)
    made = generate(run, source, opened, network, reference)
    features = gather_rows(made.features, world)
    precision, recall = precision_recall(features, reference.features)
    record = dict.fromkeys(KEYS) | {
        "fid": frechet_distance(_moments(made.features, world), Moments.of(reference.features)),
        "kid": kernel_distance(features, reference.features),
        "pixel_fd": frechet_distance(_moments(made.pixels, world), reference.pixels),
        "precision": precision,
        "recall": recall,
        "images": settings.images,
        "seed": settings.seed,
        "features": network.name,
        "reference": f"{reference.name} ({len(reference.features)} images)",
        "credit": reference.credit,
        "checkpoint": str(source.weights),
    }
    record |= as_shares({name: sum_over_ranks(counts.to(world.device), world) for name, counts in made.correct.items()})
    if world.main:
        _write(run, source, record, made.shown, _prompt_images(run, opened))
    barrier(world)
    return record


def _moments(features: Tensor, world: World) -> Moments:
    """The moments of all ranks' features."""
    return Moments(sum_over_ranks(Moments.of(features).stack, world), features.shape[1])


def _prompt_images(run: Run, opened: OpenSource) -> Tensor | None:
    """One image per prompt of `sample.prompts`, side by side, [3, H, N W]: a row of the report's figure."""
    sample = run.settings.sample
    if not sample.prompts:
        return None
    return torch.cat(list(opened.all_images(sample.prompts, sample.seed, sample.batch)), dim=2)


def _write(run: Run, source: Source, record: dict, shown: list[Tensor], prompts: Tensor | None) -> None:
    folder = run.folder / "eval" / source.name
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sample = run.settings.sample
    write_png(grid(torch.stack(shown), sample.enlarge, columns=10), str(temporary / "grid.png"))
    if prompts is not None:
        write_png(prompts, str(temporary / "prompts.png"))
    used = {
        "evaluate": run.settings.evaluate.model_dump(),
        "sampling_steps": len(source.timesteps) if source.timesteps else sample.steps,
        "guidance_scale": None if source.timesteps else sample.guidance_scale,
        "prompts": sample.prompts,
    }
    (temporary / "settings.yaml").write_text(yaml.safe_dump(used, sort_keys=False))
    (temporary / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    replace_folder(temporary, folder)
    scores = ", ".join(f"{k} {record[k]:.4g}" for k in KEYS if isinstance(record[k], float))
    log.info(f"evaluate {source.name}: {scores} -> {folder}")


def _not_evaluated(run: Run) -> list[str]:
    """Checkpoints that have weights but no metrics yet, or metrics of another number of images, seed or version, oldest
    first."""
    settings, names = run.settings.evaluate, []
    for name in CheckpointDirectory(run.folder / "backtrack").with_weights():
        file = run.folder / "eval" / name / "metrics.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if not found.keys() >= set(KEYS) or (found["images"], found["seed"]) != (settings.images, settings.seed):
            names.append(name)
    return names


def evaluate(run: Run) -> None:
    """Evaluates what `evaluate.what` names. With `evaluate.watch` it first evaluates each checkpoint as it appears, until
    the run's generator is written."""
    run.stage_folder("eval", training=False)
    settings = run.settings.evaluate
    if settings.images < run.world.size:
        raise UserError(
            f"evaluate.images={settings.images} are fewer than the {run.world.size} processes: each makes some"
        )
    network = ClassifierFeatures(run)
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
