"""`disback export`: a checkpoint as a diffusers pipeline that makes an image in one step."""

import sys
from pathlib import Path

from models.pipeline import LORA_FOLDER, check_pipeline
from trainer.backtrack import export_generator
from trainer.command import run_verb
from trainer.errors import UserError
from trainer.run import Run
from trainer.runstate import WEIGHTS


def export(run: Run) -> None:
    check_pipeline(run.settings.pipeline_folder)
    settings, folder = run.settings.export, run.folder / "backtrack"
    latest = folder / "LATEST"
    if not settings.checkpoint and not latest.exists():
        raise UserError(f"{folder} has no checkpoint yet: run `disback backtrack` first")
    name = settings.checkpoint or latest.read_text().strip()
    unet = folder / "checkpoints" / name / WEIGHTS
    if not unet.is_dir():
        known = sorted(p.parent.name for p in (folder / "checkpoints").glob(f"step-*/{WEIGHTS}"))
        raise UserError(f"{unet} is not there; checkpoints with weights: {', '.join(known) or 'none'}")
    out = Path(settings.out) if settings.out else run.folder / "generator"
    if run.world.main:
        try:
            export_generator(run, unet, out, {"checkpoint": name, "weights": "ema"}, settings.merge)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}: choose another folder with --out") from error
        print(f"{out}: DiffusionPipeline.from_pretrained('{out}')(prompt, num_inference_steps=1, guidance_scale=0.0)")
        if (out / LORA_FOLDER).is_dir():
            print(f"with its LoRA: call .load_lora_weights('{out / LORA_FOLDER}') on the pipeline first")


def main(argv: list[str] | None = None) -> int:
    flags = {"--checkpoint": ("export.checkpoint", "NAME"), "--out": ("export.out", "DIR")}
    flags["--no-merge"] = ("export.merge=false", "")
    return run_verb("export", "Writes a one-step diffusers pipeline of a checkpoint.", export, argv, flags)


if __name__ == "__main__":
    sys.exit(main())
