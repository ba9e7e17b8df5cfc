"""`disback export`: a checkpoint as a diffusers pipeline that makes an image in one step, or in the student's steps, with a
model card; and its upload to the Hugging Face hub."""

import shutil
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from models.files import LORA_FOLDER
from models.generator_pipeline import OutOfRangeError, copy_rounded, save_rounded, write_generator_pipeline
from models.lora import load_merged
from models.lora_files import is_adapter
from trainer import VERSION
from trainer.checkpoint.directory import CheckpointDirectory, step_of
from trainer.config.schema import RunSettings
from trainer.distributed.logs import log
from trainer.entry import exit_with, run_verb
from trainer.errors import UserError
from trainer.evaluation.model_card import CARD, HUB, licence_files, write_card
from trainer.training.hub import HUB_ID
from trainer.training.run import Run

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WRITE_TOKEN = "create a token with write access at https://huggingface.co/settings/tokens"
LOG_IN = f"{WRITE_TOKEN}, then run `hf auth login` or set HF_TOKEN"


def export_generator(run: Run, weights: Path, out: Path, note: dict, merge: bool = True) -> str:
    """Writes the pipeline of a generator, with its model card, and returns the call that makes an image with it.

    weights: its denoiser folder, or its LoRA folder, which is merged into the network that it started from or, without
    `merge`, put beside it as `lora/`. Sums are in float32, and rounded once, to `export.dtype`. note: what else the
    pipeline's note says; it needs `checkpoint`, the name. Raises UserError for weights that this dtype cannot hold.
    """
    wanted, precision = run.settings.export.dtype, run.settings.precision
    if wanted != "auto":
        try:
            return _export(run, weights, out, note, merge, DTYPES[wanted])
        except OutOfRangeError as error:
            raise UserError(
                f"export.dtype={wanted}: {weights}: {error}: run `disback export` with --dtype fp32"
            ) from error
    if precision != "fp32":
        try:
            return _export(run, weights, out, note, merge, torch.float16)
        except OutOfRangeError as error:
            log.warning(f"export.dtype=auto: {weights}: {error}: the export is in float32")
    return _export(run, weights, out, note, merge, torch.float32)


def _export(run: Run, weights: Path, out: Path, note: dict, merge: bool, dtype: torch.dtype) -> str:
    s, network, lora = run.settings, partial(copy_rounded, weights, dtype), None
    if is_adapter(weights) and merge:

        def network(folder: Path) -> None:
            save_rounded(load_merged(run.start_folder, weights, torch.float32, s.variant), dtype, folder)

    elif is_adapter(weights):
        network, lora = run.start_folder, network
    teacher = run.pipeline_folder

    def finish(folder: Path) -> None:
        for file in licence_files(teacher):
            shutil.copyfile(file, folder / file.name)
        write_card(run.folder, folder, out)

    note = note | {"resolution": s.data.resolution, "dtype": str(dtype).removeprefix("torch.")}
    if s.data.buckets:
        note["buckets"] = [list(shape) for shape in s.data.shapes]
    note |= describe_teacher(s, teacher)
    if s.export.push_to_hub:
        note["repository"] = s.export.push_to_hub
    return write_generator_pipeline(teacher, network, s.student_timesteps, out, note, s.variant, lora, finish)


def describe_teacher(settings: RunSettings, pipeline: Path) -> dict:
    """What a pipeline's note says of its teacher: `base_model`, a name of the hub or None, and `license`, the front matter's
    entries (empty if unknown). pipeline: the teacher's folder.

    `export.license` comes first, then the front matter of the teacher's own README.md, then its licence file.
    """
    name = settings.pipeline or settings.pretrain.start
    base = name.partition("@")[0] if HUB_ID.fullmatch(name) and not Path(name).is_dir() else None
    if settings.export.license:
        return {"base_model": base, "license": {"license": settings.export.license}}
    found = _front_matter(pipeline / CARD)
    licence = {
        key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)
    }
    files, link = licence_files(pipeline), licence.get("license_link", "")
    if files and not licence:
        licence = {"license": "other", "license_link": files[0].name}
    elif link and "://" not in link and link not in [file.name for file in files]:  # a file that is not here
        del licence["license_link"]
        if base:
            licence["license_link"] = f"{HUB}/{base}/blob/main/{link}"
    return {"base_model": base, "license": licence}


def _front_matter(card: Path) -> dict:
    """The front matter of somebody's model card; empty without one, or if it is not valid."""
    if not card.is_file() or not card.read_text(errors="replace").lstrip().startswith("---"):
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's errors, or the library's: an export does not fail because of the teacher's README
        return {}


def check_upload(repository: str) -> None:
    """Refuses what an upload would fail at, before anything is written. Raises UserError."""
    where = f"export.push_to_hub={repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{where}: not a repository's name: {' '.join(str(error).split())}") from error
    if "/" not in repository:
        raise UserError(f"{where}: the owner is missing: name it OWNER/{repository}")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set: unset it, on a machine with network access")
    if not get_token():
        raise UserError(f"{where}: there is no token of the Hugging Face hub on this machine: {LOG_IN}")


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Uploads a pipeline folder to a repository of the Hugging Face hub, created if need be; returns its address.

    private: of a repository that is created. Files that the hub already has are not sent again, so repeating a call
    completes an upload that was cut off. Raises UserError.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # the hub's, the network's or the uploader's: none of them concerns the folder
        responses = [getattr(one, "response", None) for one in (error, error.__cause__)]
        status = next((response.status_code for response in responses if response is not None), None)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = {
            401: f"the hub does not accept this token: {LOG_IN}",
            403: f"this token may not write to {repository}: {WRITE_TOKEN} for {repository.partition('/')[0]}",
            None: f"check the network, and HF_ENDPOINT ({api.endpoint})",
        }.get(status, f"the hub answered {status}")
        raise UserError(
            f"export.push_to_hub={repository}: the upload failed ({reason}): {advice}; {folder} is complete: run the same "
            "command again to upload it"
        ) from error
    return str(address)


def export(run: Run) -> None:
    """Exports `export.checkpoint`, by default the latest one, and uploads it to `export.push_to_hub`, if that is set."""
    settings, checkpoints = run.settings.export, CheckpointDirectory(run.folder / "backtrack")
    if settings.push_to_hub:
        check_upload(settings.push_to_hub)
    run.require_pipeline()
    weights = checkpoints.weights(settings.checkpoint) if settings.checkpoint else checkpoints.latest_weights()
    if not weights.is_dir():
        known = ", ".join(checkpoints.with_weights())
        raise UserError(f"{weights} does not exist; checkpoints with weights: {known or 'none'}")
    out = Path(settings.out) if settings.out else run.folder / "generator"
    if not run.world.main:
        return
    name = weights.parent.name
    try:
        call = export_generator(run, weights, out, {"checkpoint": name, "weights": "ema"}, settings.merge)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}: choose another folder with --out") from error
    print(f"{out}: pipe = DiffusionPipeline.from_pretrained('{out}'); {call}")
    if (out / LORA_FOLDER).is_dir():
        print(f"with its LoRA: call pipe.load_lora_weights('{out / LORA_FOLDER}') first")
    if settings.push_to_hub:
        step = step_of(name)
        message = f"{name if step is None else f'Step {step}'}, DisBack Trainer {VERSION}"
        print(f"uploaded to {upload(out, settings.push_to_hub, settings.private, message)}: {message}")


def main(argv: list[str] | None = None) -> int:
    flags = {
        "--checkpoint": ("export.checkpoint", "NAME"),
        "--out": ("export.out", "DIR"),
        "--no-merge": ("export.merge=false", ""),
        "--dtype": ("export.dtype", "TYPE"),
        "--push-to-hub": ("export.push_to_hub", "OWNER/NAME"),
    }
    return run_verb("export", "Writes a diffusers pipeline of a checkpoint.", export, argv, flags)


if __name__ == "__main__":
    exit_with(main)
