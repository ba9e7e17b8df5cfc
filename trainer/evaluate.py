"""`disback evaluate`: how close generated images are to real ones and to their captions, under a named protocol."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torchvision.io import write_png

from models.files import INFO_FILE
from trainer.checkpoint.directory import RAW, WEIGHTS, CheckpointDirectory
from trainer.distributed.logs import log
from trainer.distributed.world import barrier, from_main
from trainer.entry import exit_with, run_verb
from trainer.errors import UserError
from trainer.evaluation.generate import grid_images
from trainer.evaluation.job import Evaluation
from trainer.evaluation.model_card import write_card
from trainer.evaluation.networks import needed_networks
from trainer.evaluation.protocols import resolve
from trainer.evaluation.rows import Rows
from trainer.evaluation.sources import OpenSource, PipelineSource, Source, all_images, find_source
from trainer.evaluation.weights import find_weights
from trainer.path.manifest import MANIFEST
from trainer.training.preview import grid
from trainer.training.run import Run

KEYS = (
    "fid patch_fid kid kid_std pixel_fd precision recall clip_score clip_score_x100 cmmd fd_dinov2 pick_score hps_v2_1 "
    "class_accuracy colour_accuracy heldout_class_accuracy heldout_colour_accuracy images seed features reference credit "
    "checkpoint exported_from weights source_hash protocol protocol_hash published own_weights warnings"
).split()
CAPTIONS = 8  # images of a node's row, if `sample.prompts` names fewer


def evaluate_one(job: Evaluation, source: Source | PipelineSource) -> dict:
    """Scores a source and writes EVAL/<what>/; returns the metrics. Every rank must call it."""
    run, identity, opened = job.run, job.identity(source), job.opener(source)
    _check_name(job, source)
    with job.results.claimed(run.world):
        known = from_main(_scored(job, source.name, identity) if run.world.main else None, run.world)
        if known:
            name, record = known
            record |= {"checkpoint": str(source.weights), **_provenance(source)}
            if run.world.main:
                _copy(job, source, name, record)
                shutil.rmtree(job.rows_folder(source.name), ignore_errors=True)
        else:
            rows, found = job.score(source, opened)
            before = job.results.metrics(source.name) if run.world.main else {}
            record = _record(job, source, identity, found, before)
            if run.world.main:
                _write(job, source, record, rows, _prompt_images(run, opened))
            rows.remove(run.world)
        barrier(run.world)
    if run.world.main:
        _refresh_card(run, source)
    return record


def _check_name(job: Evaluation, source: Source | PipelineSource) -> None:
    """Refuses to replace the results of other weights that happen to have the same name. Every rank must call it."""
    run, other = job.run, None
    if run.world.main and not source.weights.resolve().is_relative_to(run.folder.resolve()):
        before = job.results.metrics(source.name).get("checkpoint")
        own = source.name in ("teacher", "start")
        other = before if before and not own and Path(before).resolve() != source.weights.resolve() else None
    if other := from_main(other, run.world):
        raise UserError(
            f"{job.results.folder / source.name} has the results of {other}: rename one of the two folders, or remove these "
            "results"
        )


def _record(
    job: Evaluation, source: Source | PipelineSource, identity: str, found: dict[str, float], before: dict
) -> dict:
    """What metrics.json says. before: the last one, whose other metrics stay if they are of the same images."""
    kept = {}
    if (before.get("source_hash"), before.get("protocol_hash")) == (identity, job.hash):
        kept = {key: value for key, value in before.items() if isinstance(value, float) and key in KEYS}
    reference, protocol = job.reference, job.protocol
    return dict.fromkeys(KEYS) | {
        **kept,
        **found,
        "images": job.images,
        "seed": job.run.settings.evaluate.seed,
        "features": job.networks.name if reference else before.get("features") if kept else None,
        "reference": reference.label if reference else before.get("reference") if kept else None,
        "credit": reference.credit if reference else None,
        "checkpoint": str(source.weights),
        **_provenance(source),
        "source_hash": identity,
        "protocol": protocol.name,
        "protocol_hash": job.hash,
        "published": protocol.published if job.faithful else {},
        "own_weights": job.own_weights,
        "warnings": job.warnings,
    }


def _provenance(source: Source | PipelineSource) -> dict[str, str | None]:
    """Of an exported pipeline, the checkpoint that it was made from; and whether the weights are averaged, if known."""
    file = source.pipeline / INFO_FILE
    note = json.loads(file.read_text()) if source.weights.is_relative_to(source.pipeline) and file.exists() else {}
    return {"exported_from": note.get("checkpoint"), "weights": source.kind or note.get("weights")}


def _scored(job: Evaluation, name: str, identity: str) -> tuple[str, dict] | None:
    """The metrics of the same weights under the same protocol, if an earlier evaluation has all that are asked for, and the
    name that it gave them: the last checkpoint is often the generator."""
    if job.run.settings.evaluate.keep:
        return None
    asked = {"precision" if metric == "precision_recall" else metric for metric in job.metrics}
    for other, found in sorted(job.results.finished(), key=lambda each: each[0] != name):
        same = (found.get("source_hash"), found.get("protocol_hash")) == (identity, job.hash)
        if same and all(found.get(metric) is not None for metric in asked):
            return other, found
    return None


def _copy(job: Evaluation, source: Source | PipelineSource, name: str, record: dict) -> None:
    """The results of the same weights, under another name."""

    def write(folder: Path) -> None:
        shutil.copytree(job.results.folder / name, folder, dirs_exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")

    job.results.write(source.name, write)
    log.info(f"evaluate {source.name}: scored already{f', as {name}' if name != source.name else ''}")


def _prompt_images(run: Run, opened: Callable[[], OpenSource]) -> Tensor | None:
    """One image per prompt of `sample.prompts`, side by side, [3, H, N W]: a row of the report's figure."""
    sample = run.settings.sample
    if not sample.prompts:
        return None
    return torch.cat(list(all_images(opened(), sample.prompts, sample.seed, sample.batch)), dim=2)


def _write(job: Evaluation, source: Source | PipelineSource, record: dict, rows: Rows, prompts: Tensor | None) -> None:
    settings, sample = job.run.settings, job.run.settings.sample

    def write(folder: Path) -> None:
        write_png(grid(torch.stack(grid_images(rows)), sample.enlarge, columns=10), str(folder / "grid.png"))
        if prompts is not None:
            write_png(prompts, str(folder / "prompts.png"))
        used = {
            "evaluate": settings.evaluate.model_dump(),
            "precision": settings.precision,
            "tf32": settings.network.tf32,
            "sampling_steps": len(source.timesteps) if source.timesteps else sample.steps,
            "guidance_scale": None if source.timesteps else sample.guidance_scale,
            "prompts": sample.prompts,
        }
        (folder / "settings.yaml").write_text(yaml.safe_dump(used, sort_keys=False))
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")

    written = job.results.write(source.name, write)
    shown = ", ".join(f"{k} {record[k]:.4g}" for k in KEYS if isinstance(record[k], float))
    log.info(f"evaluate {source.name} ({record['protocol']} {record['protocol_hash']}): {shown} -> {written}")
    for text in record["warnings"]:
        log.warning(f"evaluate {source.name}: {text}")


def _refresh_card(run: Run, source: Source | PipelineSource) -> None:
    """The generator's model card shows its scores."""
    generator = run.folder / "generator"
    if source.pipeline == generator and (run.folder / "config.yaml").exists():
        write_card(run.folder, generator)


def draw_nodes(job: Evaluation) -> None:
    """A row of images from each node of the path, drawn with the diffusion sampler, for the report. The nodes are shared out
    over the ranks; those that are there are not drawn again."""
    run, count = job.run, job.run.settings.evaluate.node_images
    manifest = run.settings.path_folder / MANIFEST
    if not count or run.settings.backtrack.path != "walk" or not manifest.exists():  # not once more for each ablation
        return
    captions = (run.settings.sample.prompts or [prompt.text for prompt in job.prompts[:CAPTIONS]])[:count]
    folder = job.results.folder / "nodes"
    folder.mkdir(exist_ok=True)
    for node in json.loads(manifest.read_text())["nodes"][run.world.rank :: run.world.size]:
        file = folder / f"node-{node['index']:04d}.png"
        if file.exists() and file.stat().st_mtime > manifest.stat().st_mtime:
            continue
        source = find_source(run, file.stem if node["index"] else "teacher")
        images = all_images(source.open(run), captions, run.settings.sample.seed, run.settings.sample.batch)
        write_png(torch.cat(list(images), dim=2), str(file.with_suffix(".tmp")))
        os.replace(file.with_suffix(".tmp"), file)
        log.info(f"evaluate: drew node {node['index']} -> {file}")
    barrier(run.world)


def _not_evaluated(job: Evaluation) -> list[str]:
    """Checkpoints whose weights have no metrics yet, older ones, of another seed, or without a metric that is asked for; oldest
    first, of each the averaged weights and, if they were saved, the raw ones."""
    checkpoints, names = CheckpointDirectory(job.run.folder / "backtrack"), []
    raw, done = set(checkpoints.with_weights(RAW)), dict(job.results.finished())
    asked = {"precision" if metric == "precision_recall" else metric for metric in job.metrics}
    for name in checkpoints.with_weights(WEIGHTS):
        for what, kind in ((name, WEIGHTS), *(((f"{name}-raw", RAW),) if name in raw else ())):
            found, file = done.get(what, {}), job.results.folder / what / "metrics.json"
            same = (found.get("protocol_hash"), found.get("seed")) == (job.hash, job.run.settings.evaluate.seed)
            if not same or any(found.get(metric) is None for metric in asked):
                names.append(what)
            elif file.stat().st_mtime < checkpoints.weights(name, kind).stat().st_mtime:
                names.append(what)  # trained again
    return names


def _watch(job: Evaluation) -> None:
    """Evaluates checkpoints as they appear, until the run's generator is written."""
    run = job.run
    while True:
        finished = from_main((run.folder / "generator" / "model_index.json").exists(), run.world)
        for name in from_main(_not_evaluated(job) if run.world.main else None, run.world):
            if from_main(_is_there(run, name) if run.world.main else None, run.world):
                evaluate_one(job, find_source(run, name))
            elif run.world.main:
                log.warning(
                    f"evaluate {name}: its weights were deleted before their turn (see loop.keep_weights_every)"
                )
        if finished:
            return
        time.sleep(run.settings.evaluate.poll_seconds)


def _is_there(run: Run, name: str) -> bool:
    kind = RAW if name.endswith("-raw") else WEIGHTS
    return CheckpointDirectory(run.folder / "backtrack").weights(name.removesuffix("-raw"), kind).is_dir()


def list_weights(run: Run) -> None:
    """Prints what the metrics' networks need and what of it is on this machine."""
    protocol = resolve(run.settings.evaluate)
    metrics = tuple(run.settings.evaluate.metrics) or protocol.metrics
    found = find_weights(run, protocol, needed_networks(protocol, metrics))
    if run.world.main:
        print(f"protocol {protocol.name}: {', '.join(metrics)}")
        print("\n".join(weights.line() for weights in found.values()) or "no weights are needed")


def evaluate(run: Run) -> None:
    """Evaluates what `evaluate.what` names. With `evaluate.watch` it first evaluates each checkpoint as it appears, until
    the run's generator is written."""
    settings = run.settings.evaluate
    if settings.list_weights:
        return list_weights(run)
    run.require_pipeline()
    names = [settings.what] if isinstance(settings.what, str) else settings.what
    if not settings.watch:  # else they may not be there yet
        for what in names:
            find_source(run, what)
    run.stage_folder(settings.folder, training=False)
    job = Evaluation.prepare(run)
    if settings.watch:
        _watch(job)
    for what in names:
        evaluate_one(job, find_source(run, what))
    draw_nodes(job)


def main(argv: list[str] | None = None) -> int:
    flags = {
        "--watch": ("evaluate.watch", ""),
        "--checkpoint": ("evaluate.what", "WHAT"),
        "--weights": ("evaluate.list_weights", ""),
        "--keep": ("evaluate.keep", "LAYOUT"),
    }
    return run_verb("evaluate", "Scores a generator under a named protocol.", evaluate, argv, flags)


if __name__ == "__main__":
    exit_with(main)
