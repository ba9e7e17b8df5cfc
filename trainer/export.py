"""`disback export`: a checkpoint as a diffusers pipeline that makes an image in one step, or in the student's steps."""

from pathlib import Path

from models.generator_pipeline import write_generator_pipeline
from models.lora import is_adapter, load_merged
from models.pipeline import LORA_FOLDER
from trainer.checkpoint.directory import CheckpointDirectory
from trainer.entry import exit_with, run_verb
from trainer.errors import UserError
from trainer.training.run import Run


def export_generator(run: Run, weights: Path, out: Path, note: dict, merge: bool = True) -> str:
    """Writes the pipeline of a generator and returns the call that makes an image with it.

    weights: its denoiser folder, or its LoRA folder, which is merged into the network that it started from or, without
    `merge`, put beside it as `lora/`. note: what else the pipeline's note says.
    """
    s, network, lora = run.settings, weights, None
    if is_adapter(weights) and merge:

        def network(folder: Path) -> None:
            load_merged(run.start_folder, weights, run.dtype, s.variant).save_pretrained(folder)

    elif is_adapter(weights):
        network, lora = run.start_folder, weights
    note = note | {"resolution": s.data.resolution}
    return write_generator_pipeline(run.pipeline_folder, network, s.student_timesteps, out, note, s.variant, lora)


def export(run: Run) -> None:
    """Exports `export.checkpoint`, by default the latest one."""
    run.require_pipeline()
    settings, checkpoints = run.settings.export, CheckpointDirectory(run.folder / "backtrack")
    weights = checkpoints.weights(settings.checkpoint) if settings.checkpoint else checkpoints.latest_weights()
    if not weights.is_dir():
        known = ", ".join(checkpoints.with_weights())
        raise UserError(f"{weights} does not exist; checkpoints with weights: {known or 'none'}")
    out = Path(settings.out) if settings.out else run.folder / "generator"
    if run.world.main:
        try:
            call = export_generator(
                run, weights, out, {"checkpoint": weights.parent.name, "weights": "ema"}, settings.merge
            )
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}: choose another folder with --out") from error
        print(f"{out}: pipe = DiffusionPipeline.from_pretrained('{out}'); {call}")
        if (out / LORA_FOLDER).is_dir():
            print(f"with its LoRA: call pipe.load_lora_weights('{out / LORA_FOLDER}') first")


def main(argv: list[str] | None = None) -> int:
    flags = {
        "--checkpoint": ("export.checkpoint", "NAME"),
        "--out": ("export.out", "DIR"),
        "--no-merge": ("export.merge=false", ""),
    }
    return run_verb("export", "Writes a diffusers pipeline of a checkpoint.", export, argv, flags)


if __name__ == "__main__":
    exit_with(main)
