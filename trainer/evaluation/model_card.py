"""The model card of an exported generator: README.md in its pipeline folder, as the Hugging Face hub reads it.

It is made of the pipeline's disback.json and of files in the run folder, so that it can be written again after an evaluation.
"""

import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from data.shard_patterns import entries_of
from models.files import INFO_FILE, LORA_FILE, LORA_FOLDER, read_json
from trainer.checkpoint.directory import CheckpointDirectory, step_of
from trainer.checkpoint.files import write_text
from trainer.evaluation.results import Results

CARD, GRID = "README.md", "grid.png"
LICENCE_FILE = re.compile(r"licen[cs]e(\.md|\.txt)?", re.IGNORECASE)
HUB = "https://huggingface.co"
PAPER = "https://arxiv.org/abs/2408.15991"
ANY_PROMPT = "a caption like those of the training data"
# The scores of a metrics.json: name, and whether higher or lower is better.
SCORES = {
    "fid": ("FID", "lower"),
    "patch_fid": ("patch FID", "lower"),
    "kid": ("KID", "lower"),
    "pixel_fd": ("pixel FD", "lower"),
    "fd_dinov2": ("FD-DINOv2", "lower"),
    "cmmd": ("CMMD", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "clip_score": ("CLIP score", "higher"),
    "pick_score": ("PickScore", "higher"),
    "hps_v2_1": ("HPSv2.1", "higher"),
    "class_accuracy": ("class accuracy", "higher"),
    "colour_accuracy": ("colour accuracy", "higher"),
    "heldout_class_accuracy": ("class accuracy, new combinations", "higher"),
    "heldout_colour_accuracy": ("colour accuracy, new combinations", "higher"),
}
METHODS = {
    "walk": f"Distribution Backtracking ([arXiv:2408.15991]({PAPER}))",
    "warm": "score distillation with the teacher as the target and a fake score that starts at the far node of a "
    f"degradation path (an ablation of [DisBack]({PAPER}))",
    "none": f"score distillation without a degradation path (an ablation of [DisBack]({PAPER}))",
}


def licence_files(pipeline: Path) -> list[Path]:
    """The licence files at the top of a pipeline folder."""
    return sorted(file for file in pipeline.iterdir() if LICENCE_FILE.fullmatch(file.name) and file.is_file())


def write_card(run: Path, folder: Path, out: Path | None = None) -> None:
    """Writes README.md into a pipeline folder that `export` wrote, and grid.png if there is one to show.

    run: the run's folder. folder: the pipeline, with its disback.json. out: where the folder will be, if elsewhere. Scores and
    grid are those of the exported weights only: call it again after an evaluation. Raises UserError without a
    config.yaml in the run folder, ModelError without a disback.json, OSError.
    """
    note, results, out = read_json(folder / INFO_FILE), Results(run), out or folder
    evaluations = _evaluations(run, note, out)
    grid = _grid(results, note, evaluations)
    if grid:
        temporary = folder / f"{GRID}.tmp"
        shutil.copyfile(grid[0], temporary)
        os.replace(temporary, folder / GRID)
    else:
        (folder / GRID).unlink(missing_ok=True)
    body = [
        *_what_it_is(folder, note, results),
        *_how_to_run(folder, note, results.config, out),
        *([f"## Samples\n\n![Samples]({GRID})", grid[1]] if grid else []),
        *_scores(evaluations, results.config),
        *_recipe(run, note, results.config),
        *_licence(folder, note),
    ]
    card = f"---\n{_metadata(folder, note).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"
    write_text(str(ModelCard(card)), folder / CARD)


def _metadata(folder: Path, note: dict) -> ModelCardData:
    tags = ["one-step" if len(note["timesteps"]) == 1 else "few-step", "distillation", "disback"]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=note.get("base_model"),
        tags=tags + (["lora"] if (folder / LORA_FOLDER).is_dir() else []),
        **({"license": "other"} | note.get("license", {})),
    )


def escape(text: object) -> str:
    """Text as one line of Markdown that shows exactly this text, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#])", r"\\\1", " ".join(str(text).split()))


def without_folders(text: str) -> str:
    """Text in which every absolute path is only its last component; web addresses stay."""
    last = re.compile(r"""(?<![\w:/.*}~])~?/(?:[^\s/'"(),;\]]+/)*([^\s/'"(),;\]]+)/?""")
    quoted = re.sub(r"""(['"])~?/[^'"]*?([^/'"]+)/?\1""", r"\1\2\1", text)
    return last.sub(r"\1", quoted)


def data_names(patterns: str | list[str]) -> str:
    """Names of data without their folders: the last component of each pattern."""
    return ", ".join(name.rstrip("/").rpartition("/")[2] for name in entries_of(patterns))


def _what_it_is(folder: Path, note: dict, results: Results) -> list[str]:
    config, steps, base = results.config, len(note["timesteps"]), note.get("base_model")
    title = note.get("repository", "").partition("/")[2] or results.folder.resolve().name
    teacher = f"[{escape(base)}]({HUB}/{base})" if base else "a diffusion model"
    size, kind = note["resolution"], read_json(folder / "model_index.json")["_class_name"]
    once = "one call of its denoiser" if steps == 1 else f"{steps} calls of its denoiser"
    return [
        f"# {escape(title)}",
        f"A text-to-image generator that makes an image of {size} x {size} pixels in {once}, without guidance. It was distilled "
        f"from {teacher} by {METHODS[config['backtrack']['path']]}, with DisBack Trainer {config['about']['disback']}. The "
        f"folder is a diffusers pipeline (`{kind}`).",
    ]


def _how_to_run(folder: Path, note: dict, config: dict, out: Path) -> list[str]:
    prompt = json.dumps((config["sample"]["prompts"] or [ANY_PROMPT])[0], ensure_ascii=False)
    name = json.dumps(note.get("repository") or out.resolve().name)
    exported = {"bf16": "bfloat16", "fp32": "float32"}[config["precision"]]  # by versions that do not note it
    exported = note.get("dtype", exported)
    dtype = "" if exported == "float32" else f", torch_dtype=torch.{exported}"
    code = ["import torch"] if dtype else []
    code += ["from diffusers import DiffusionPipeline", ""]
    code += [f'pipe = DiffusionPipeline.from_pretrained({name}{dtype}).to("cuda")']
    lora = (folder / LORA_FOLDER).is_dir()
    if lora:
        code += [f'pipe.load_lora_weights({name}, subfolder="{LORA_FOLDER}", weight_name="{LORA_FILE}")']
    code += [f"prompt = {prompt}", f"image = {note['call']}.images[0]"]
    # A fence that no run of backticks in the prompt ends.
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", prompt)), default=0))
    text = f"## How to run it\n\n{fence}python\n" + "\n".join(code) + f"\n{fence}"
    return [text] + (
        ["The LoRA is not merged: without its line, the pipeline is the start of the training."] if lora else []
    )


def _evaluations(run: Path, note: dict, out: Path) -> list[tuple[Path, dict]]:
    """The folders and metrics of the evaluations of exactly the exported weights, one per folder of results.

    That of "generator" counts if this pipeline is the run's `generator/`. An evaluation that is older than the checkpoint's
    weights is of a training before them; one that names another checkpoint (`exported_from`) is of another export.
    """
    checkpoint = note["checkpoint"]
    weights = CheckpointDirectory(run / "backtrack").weights(checkpoint)
    since = max((file.stat().st_mtime for file in weights.glob("*")), default=0.0)
    own = ["generator"] if out.resolve() == (run / "generator").resolve() else []
    found: dict[Path, tuple[Path, dict]] = {}
    for what in [*own, checkpoint]:
        for file in sorted(run.glob(f"*/{what}/metrics.json")):
            try:
                metrics = json.loads(file.read_text())
            except ValueError:
                continue  # damaged; an export at the end of a long training does not fail because of it
            same = metrics.get("exported_from") or checkpoint
            if same == checkpoint and file.stat().st_mtime >= since:
                found.setdefault(file.parent.parent, (file.parent, metrics))
    return list(found.values())


def _grid(results: Results, note: dict, evaluations: list[tuple[Path, dict]]) -> tuple[Path, str] | None:
    """A picture of samples, and the sentence under it: of an evaluation, else of training at or before the checkpoint."""
    for folder, metrics in evaluations:
        if (folder / GRID).exists():
            return (
                folder / GRID,
                f"The first images of an evaluation, seeds from {metrics.get('seed', 0)}, not selected.",
            )
    last = step_of(note["checkpoint"])
    earlier = [(step, file) for step, file in results.grids("backtrack") if last is not None and step <= last]
    if not earlier:
        return None
    step, file = earlier[-1]
    prompts = ", ".join(f'"{escape(prompt)}"' for prompt in results.config["sample"]["prompts"])
    return file, f"Samples during training, at step {step:,}, not selected." + (
        f" Prompts: {prompts}." if prompts else ""
    )


def _scores(evaluations: list[tuple[Path, dict]], config: dict) -> list[str]:
    """A table per evaluation, each under the protocol that its numbers were made by. Without a protocol, no numbers."""
    text = []
    for _, metrics in evaluations:
        values = [(*SCORES[key], metrics[key]) for key in SCORES if metrics.get(key) is not None]
        protocol = _protocol(metrics, config)
        if values and protocol:
            rows = [f"| {name} | {value:.4g} | {better} |" for name, better, value in values]
            text += ["\n".join(["| score | value | better |", "|---|---|---|", *rows]), protocol]
    return ["## Scores", *text] if text else []


def _protocol(metrics: dict, config: dict) -> str:
    """How the numbers of an evaluation were made, as a list; empty if its metrics.json does not say."""
    if not (metrics.get("protocol") or metrics.get("features")):
        return ""
    protocol, heldout, warnings = metrics.get("protocol"), config["data"]["heldout"], metrics.get("warnings") or []
    if protocol and metrics.get("protocol_hash"):
        protocol += f" (hash {metrics['protocol_hash']})"
    reference = metrics.get("reference")
    if reference and heldout:
        reference = str(reference).replace(str(heldout), data_names(heldout))
    entries = {
        "protocol": protocol,
        "images": metrics.get("images") and f"{metrics['images']:,} generated, seeds from {metrics.get('seed', 0)}",
        "features": metrics.get("features"),
        "reference": reference,
        "credit": metrics.get("credit"),
        "warnings": "; ".join([warnings] if isinstance(warnings, str) else warnings),
    }
    return "\n".join(f"- {key}: {escape(without_folders(str(value)))}" for key, value in entries.items() if value)


def _recipe(run: Path, note: dict, config: dict) -> list[str]:
    settings, lora, gan, about = config["backtrack"], config["lora"], config["gan"], config["about"]
    step, walk = step_of(note["checkpoint"]), settings["walk"]
    manifest = (Path(config["path"]) if config["path"] else run / "path") / "path.json"
    path = settings["path"]
    if path != "none" and manifest.exists():
        path += f", {len(json.loads(manifest.read_text())['nodes']) - 1} nodes before the teacher"
    if settings["path"] == "walk":
        path += f", {walk['mode']}: {walk['interval']:,} generator updates per node"
        path += " at least" if walk["mode"] == "adaptive" else ""
    rates = f"{settings['generator']['lr']:g} (generator), {settings['fake_score']['lr']:g} (fake score), AdamW"
    steps = f"{settings['steps']:,} fake-score updates, a generator update every {settings['fake_updates']}"
    steps = steps if step is None else f"{step:,} of {steps}"
    gan_weights = f"{gan['generator_weight']:g} (generator), {gan['head_weight']:g} (head)"
    rows = {
        "objective": settings["objective"],
        "path": path,
        "steps": steps,
        "batch": f"{settings['batch']:,}",
        "learning rates": rates,
        "guidance scale of the target": f"{settings['guidance_scale']:g}",
        "conditioning timesteps": ", ".join(str(t) for t in note["timesteps"]),
        "weight average": f"decay {settings['ema']:g} per generator update; the exported weights are the average",
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha'] or lora['rank']:g}" if lora["rank"] else None,
        "GAN term, weights": gan_weights if gan["enabled"] else None,
        "precision": config["precision"],
        "resolution": note["resolution"],
        "data": data_names(config["data"]["train"]),
        "seed": config["seed"],
        "processes": f"{about['world_size']} ({about['device']})",
        "git commit": about.get("git_commit"),
        "versions": ", ".join(f"{k} {v}" for k, v in about.items() if k not in ("world_size", "device", "git_commit")),
    }
    lines = [f"| {key} | {escape(value)} |" for key, value in rows.items() if value not in (None, "")]
    return ["## Training", "\n".join(["| setting | value |", "|---|---|", *lines])]


def _licence(folder: Path, note: dict) -> list[str]:
    licence, base = note.get("license", {}), note.get("base_model")
    where = f"that of [{escape(base)}]({HUB}/{base})" if base else "that of the model that it was distilled from"
    if not licence:
        text = (
            f"**To be filled in by the owner**: no licence was found beside the teacher. It depends on {where}. Set "
            "`export.license` to its identifier on the hub and export again."
        )
    else:
        text = escape(licence.get("license_name") or licence.get("license", "other"))
        link = licence.get("license_link")
        text += f": see [{escape(link)}]({quote(link, safe=':/?&=#%+~')})." if link else "."
        others = [f"[{escape(file.name)}]({file.name})" for file in licence_files(folder) if file.name != link]
        text += f" Copied from the teacher: {', '.join(others)}." if others else ""
    return ["## Licence", text]
