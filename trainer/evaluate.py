"""`disback evaluate`: how close generated images are to real ones and to their captions, under a named protocol."""

import json
import os
import shutil
import time
from collections.abc import Callable

import torch
import yaml
from torch import Tensor
from torchvision.io import write_png

from models.pipeline import INFO_FILE, replace_folder
from trainer.checkpoint.directory import RAW, WEIGHTS, CheckpointDirectory
from trainer.distributed.logs import log
from trainer.distributed.world import barrier, from_main
from trainer.entry import exit_with, run_verb
from trainer.evaluation.generate import grid_images
from trainer.evaluation.job import Evaluation, results_folder
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
    "checkpoint exported_from weights source_hash protocol protocol_hash published warnings"
).split()
CAPTIONS = 8  # images of a node's row, if `sample.prompts` names fewer


def evaluate_one(job: Evaluation, source: Source | PipelineSource) -> dict:
    """Scores a source and writes EVAL/<what>/; returns the metrics. Every rank must call it."""
    run, protocol, reference = job.run, job.protocol, job.reference
    identity, opened = job.identity(source), job.opener(source)
    known = from_main(_scored(job, source.name, identity) if run.world.main else None, run.world)
    if known:
        if run.world.main:
            _copy(run, known, source)
        barrier(run.world)
        return known
    rows, found = job.score(source, opened)
    record = dict.fromkeys(KEYS) | found
    record |= {
        "images": job.images,
        "seed": run.settings.evaluate.seed,
        "features": job.networks.name,
        "reference": reference.label if reference else None,
        "credit": reference.credit if reference else None,
        "checkpoint": str(source.weights),
        **_provenance(source),
        "source_hash": identity,
        "protocol": protocol.name,
        "protocol_hash": job.hash,
        "published": protocol.published,
        "warnings": job.warnings,
    }
    if run.world.main:
        _write(run, source, record, rows, _prompt_images(run, opened))
    rows.remove(run.world)
    return record


def _provenance(source: Source | PipelineSource) -> dict[str, str | None]:
    """Of an exported pipeline, the checkpoint that it was made from; and whether the weights are averaged, if known."""
    file = source.pipeline / INFO_FILE
    note = json.loads(file.read_text()) if source.weights.is_relative_to(source.pipeline) and file.exists() else {}
    return {"exported_from": note.get("checkpoint"), "weights": source.kind or note.get("weights")}


def _scored(job: Evaluation, name: str, identity: str) -> dict | None:
    """The metrics of the same weights under the same protocol, if an earlier evaluation has them all, with the name that it
    gave them: the last checkpoint is often the generator."""
    if job.run.settings.evaluate.keep:
        return None
    files = sorted(results_folder(job.run).glob("*/metrics.json"), key=lambda file: file.parent.name != name)
    for file in files:
        found = json.loads(file.read_text())
        same = (found.get("source_hash"), found.get("protocol_hash")) == (identity, job.hash)
        asked = {"precision" if metric == "precision_recall" else metric for metric in job.metrics}
        if same and all(found.get(metric) is not None for metric in asked):
            return found | {"name": file.parent.name}
    return None


def _copy(run: Run, record: dict, source: Source | PipelineSource) -> None:
    """The results of the same weights under another name."""
    folder, name = results_folder(run), record.pop("name")
    record |= {"checkpoint": str(source.weights), **_provenance(source)}
    temporary = folder / f"{source.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(folder / name, temporary)
    (temporary / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    replace_folder(temporary, folder / source.name)
    log.info(f"evaluate {source.name}: scored already{f', as {name}' if name != source.name else ''}")
    _refresh_card(run, source)


def _prompt_images(run: Run, opened: Callable[[], OpenSource]) -> Tensor | None:
    """One image per prompt of `sample.prompts`, side by side, [3, H, N W]: a row of the report's figure."""
    sample = run.settings.sample
    if not sample.prompts:
        return None
    return torch.cat(list(all_images(opened(), sample.prompts, sample.seed, sample.batch)), dim=2)


def _write(run: Run, source: Source | PipelineSource, record: dict, rows: Rows, prompts: Tensor | None) -> None:
    folder = results_folder(run) / source.name
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sample = run.settings.sample
    write_png(grid(torch.stack(grid_images(rows)), sample.enlarge, columns=10), str(temporary / "grid.png"))
    if prompts is not None:
        write_png(prompts, str(temporary / "prompts.png"))
    used = {
        "evaluate": run.settings.evaluate.model_dump(),
        "precision": run.settings.precision,
        "tf32": run.settings.network.tf32,
        "sampling_steps": len(source.timesteps) if source.timesteps else sample.steps,
        "guidance_scale": None if source.timesteps else sample.guidance_scale,
        "prompts": sample.prompts,
    }
    (temporary / "settings.yaml").write_text(yaml.safe_dump(used, sort_keys=False))
    (temporary / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    replace_folder(temporary, folder)
    shown = ", ".join(f"{k} {record[k]:.4g}" for k in KEYS if isinstance(record[k], float))
    log.info(f"evaluate {source.name} ({record['protocol']} {record['protocol_hash']}): {shown} -> {folder}")
    for text in record["warnings"]:
        log.warning(f"evaluate {source.name}: {text}")
    _refresh_card(run, source)


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
    if not count or run.settings.backtrack.path == "none" or not manifest.exists():
        return
    captions = (run.settings.sample.prompts or [prompt.text for prompt in job.prompts[:CAPTIONS]])[:count]
    folder = results_folder(run) / "nodes"
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
    """Checkpoints whose weights have no metrics yet, or metrics of another seed, oldest first; of each the averaged weights
    and, if they were saved, the raw ones."""
    checkpoints, names = CheckpointDirectory(job.run.folder / "backtrack"), []
    raw = set(checkpoints.with_weights(RAW))
    for name in checkpoints.with_weights(WEIGHTS):
        for what in [name, *([f"{name}-raw"] if name in raw else [])]:
            file = results_folder(job.run) / what / "metrics.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            if (found.get("protocol_hash"), found.get("seed")) != (job.hash, job.run.settings.evaluate.seed):
                names.append(what)
    return names


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
    names = [settings.what] if isinstance(settings.what, str) else settings.what
    if not settings.watch:  # else they may not be there yet
        for what in names:
            find_source(run, what)
    run.stage_folder(settings.folder, training=False)
    job = Evaluation.prepare(run)
    while settings.watch:
        finished = from_main((run.folder / "generator" / "model_index.json").exists(), run.world)
        for name in from_main(_not_evaluated(job) if run.world.main else None, run.world):
            evaluate_one(job, find_source(run, name))
        if finished:
            break
        time.sleep(settings.poll_seconds)
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
