"""`disback sample`: prompts to PNG files and a grid."""

import sys
from pathlib import Path

import torch
from torchvision.io import write_png
from torchvision.utils import make_grid

from trainer.entry import run_verb
from trainer.errors import UserError
from trainer.evaluation.sources import find_source
from trainer.training.run import Run
from trainer.training.stage import enlarge


def sample(run: Run) -> None:
    """Writes `images` images of the prompts in turn; image i is drawn with seed + i, whatever the batch."""
    settings = run.settings.sample
    if not settings.prompts:
        raise UserError("sample.prompts is empty: give prompts, such as sample.prompts='[\"a handwritten seven\"]'")
    source = find_source(run, settings.source).open(run)
    out = Path(settings.out) if settings.out else run.folder / "samples"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}: choose another folder with --out") from error
    captions = [settings.prompts[i % len(settings.prompts)] for i in range(settings.images)]
    images = []
    for first in range(0, settings.images, settings.batch):
        part = list(range(first, min(first + settings.batch, settings.images)))
        images.append(source.images([captions[i] for i in part], settings.seed, part).cpu())
    images = torch.cat(images)
    if run.world.main:
        for i, image in enumerate(images):
            write_png(image, str(out / f"{i:05d}.png"))
        write_png(
            make_grid(enlarge(images, settings.enlarge), settings.columns, 2, pad_value=128), str(out / "grid.png")
        )
        print(f"{len(images)} images of {source.source.weights} and grid.png in {out}")


def main(argv: list[str] | None = None) -> int:
    flags = {"--source": ("sample.source", "WHAT"), "--out": ("sample.out", "DIR")}
    return run_verb("sample", "Prompts to images, from a run, a checkpoint or a pipeline folder.", sample, argv, flags)


if __name__ == "__main__":
    sys.exit(main())
