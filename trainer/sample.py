"""`disback sample`: prompts to PNG files and a grid."""

from pathlib import Path

from torchvision.io import write_png

from trainer.entry import exit_with, run_verb
from trainer.errors import UserError
from trainer.evaluation.sources import all_images, find_source
from trainer.training.preview import grid
from trainer.training.run import Run


def sample(run: Run) -> None:
    """Writes `images` images, cycling through the prompts; image i is drawn with seed + i, whatever the batch size."""
    settings = run.settings.sample
    if not settings.prompts:
        raise UserError("sample.prompts is empty: give prompts, such as sample.prompts='[\"a handwritten seven\"]'")
    source = find_source(run, settings.source)
    out = Path(settings.out) if settings.out else run.folder / "samples"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}: choose another folder with --out") from error
    captions = [settings.prompts[i % len(settings.prompts)] for i in range(settings.images)]
    images = all_images(source.open(run), captions, settings.seed, settings.batch)
    if run.world.main:
        for i, image in enumerate(images):
            write_png(image, str(out / f"{i:05d}.png"))
        write_png(grid(images, settings.enlarge, settings.columns), str(out / "grid.png"))
        print(f"{len(images)} images of {source.weights} and grid.png in {out}")


def main(argv: list[str] | None = None) -> int:
    flags = {"--source": ("sample.source", "WHAT"), "--out": ("sample.out", "DIR")}
    return run_verb("sample", "Prompts to images, from a run, a checkpoint or a pipeline folder.", sample, argv, flags)


if __name__ == "__main__":
    exit_with(main)
