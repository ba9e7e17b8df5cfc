"""`disback export`: a checkpoint as a diffusers pipeline that makes an image in one step, or in the student's."""

import sys
from pathlib import Path

from models.generator_pipeline import write_student_pipeline
from models.lora import is_adapter, load_merged
from models.pipeline import LORA_FOLDER
from trainer.checkpoint.directory import WEIGHTS
from trainer.entry import run_verb
from trainer.errors import UserError
from trainer.training.run import Run


def export_generator(run: Run, weights: Path, out: Path, note: dict, merge: bool = True) -> str:
    """Writes a pipeline of a generator's weights folder, or of its LoRA folder: merged into the network that it started
    from, or beside it as `lora/`. Returns the call that makes an image with it."""
    s, network, lora = run.settings, weights, None
    if is_adapter(weights) and merge:

        def network(folder: Path) -> None:
            load_merged(run.start_folder, weights, run.dtype, s.variant).save_pretrained(folder)

    elif is_adapter(weights):
        network, lora = run.start_folder, weights
    note = note | {"resolution": s.data.resolution}
    return write_student_pipeline(run.pipeline_folder, network, s.student_timesteps, out, note, s.variant, lora)


def export(run: Run) -> None:
    run.require_pipeline()
    settings, folder = run.settings.export, run.folder / "backtrack"
    latest = folder / "LATEST"
    if not settings.checkpoint and not latest.exists():
        raise UserError(f"{folder} has no checkpoint yet: run `disback backtrack` first")
    name = settings.checkpoint or latest.read_text().strip()
    weights = folder / "checkpoints" / name / WEIGHTS
    if not weights.is_dir():
        known = sorted(p.parent.name for p in (folder / "checkpoints").glob(f"step-*/{WEIGHTS}"))
        raise UserError(f"{weights} is not there; checkpoints with weights: {', '.join(known) or 'none'}")
    out = Path(settings.out) if settings.out else run.folder / "generator"
    if run.world.main:
        try:
            call = export_generator(run, weights, out, {"checkpoint": name, "weights": "ema"}, settings.merge)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}: choose another folder with --out") from error
        print(f"{out}: pipe = DiffusionPipeline.from_pretrained('{out}'); {call}")
        if (out / LORA_FOLDER).is_dir():
            print(f"with its LoRA: call pipe.load_lora_weights('{out / LORA_FOLDER}') first")


def main(argv: list[str] | None = None) -> int:
    flags = {"--checkpoint": ("export.checkpoint", "NAME"), "--out": ("export.out", "DIR")}
    flags["--no-merge"] = ("export.merge=false", "")
    return run_verb("export", "Writes a diffusers pipeline of a checkpoint.", export, argv, flags)


if __name__ == "__main__":
    sys.exit(main())
