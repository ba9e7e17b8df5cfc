"""The command line of `disback shards`."""

import argparse
import re

from trainer.entry import Parser, path_argument, pattern_argument

DATA_OPTIONS = (  # fields of DataSettings
    "resolution",
    "buckets",
    "bucket_step",
    "min_size",
    "filters",
    "image_keys",
    "caption_key",
    "caption_field",
)


def _shapes(text: str) -> str | list[tuple[int, int]]:
    """`auto`, or shapes such as 1024x1024,832x1216 (height x width)."""
    if text == "auto":
        return text
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write auto, or HEIGHTxWIDTH,... such as 1024x1024,832x1216")
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def _fields(text: str) -> str | dict[str, float]:
    """A field, or several with their weights: caption:1,blip:3."""
    if ":" not in text:
        return text
    try:
        return {name: float(weight) for name, _, weight in (part.rpartition(":") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME, or NAME:WEIGHT,NAME:WEIGHT") from error


def _job(text: str) -> tuple[int, int]:
    """`I/N`, counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, with I from 0 to N - 1")
    return int(match[1]), int(match[2])


def shards_parser() -> Parser:
    """Actions, of which one is given, and their options."""
    parser = Parser(prog="disback shards", description="Builds, encodes, indexes and validates WebDataset shards.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--emoji", action="store_true", help="captioned colour emoji (OpenMoji), for the demo")
    what.add_argument(
        "--digits", action="store_true", help="scikit-learn's 1,797 handwritten digits, for the small demo"
    )
    what.add_argument(
        "--images", type=path_argument, metavar="DIR", help="every image below a folder, with its caption"
    )
    what.add_argument(
        "--index",
        type=pattern_argument,
        metavar="SHARDS",
        help="(re)build the index of a folder, glob or brace pattern of tars",
    )
    what.add_argument(
        "--validate",
        type=pattern_argument,
        metavar="SHARDS",
        help="count samples and rejects; fails where a shard is broken",
    )
    what.add_argument(
        "--encode",
        type=pattern_argument,
        metavar="SHARDS",
        help="latents (and text states) of shards as new shards in --out",
    )
    parser.add_argument(
        "--captions",
        type=path_argument,
        metavar="FILE",
        help="with --images: .json, .jsonl, .csv, .tsv or .parquet of captions",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        help="folder to write into (default for --emoji and --digits: shards/emoji, shards/digits)",
    )
    parser.add_argument("--per-shard", type=int, default=1000, help="samples per shard (default 1000)")
    parser.add_argument(
        "--repair", type=path_argument, metavar="OUT", help="with --validate: write clean copies of the shards into OUT"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="with --validate and --images: how many share the work (default 1)"
    )
    parser.add_argument("--decode", action="store_true", help="with --validate: decode every image too")
    reading = parser.add_argument_group("with --validate and --encode, as in the data settings of a run")
    reading.add_argument(
        "--config",
        type=path_argument,
        metavar="FILE",
        help="a run's configuration, whose data section these options change",
    )
    reading.add_argument("--resolution", type=int, help="side of the square images in pixels (--validate: 1024)")
    reading.add_argument(
        "--buckets", type=_shapes, metavar="SHAPES", help="aspect-ratio buckets: auto, or HEIGHTxWIDTH,HEIGHTxWIDTH,..."
    )
    reading.add_argument("--bucket-step", type=int, metavar="PIXELS", help="with --buckets auto (default 64)")
    reading.add_argument("--min-size", type=int, metavar="PIXELS", help="leave out images with a shorter side")
    reading.add_argument(
        "--filter",
        action="append",
        dest="filters",
        metavar="EXPR",
        help="such as 'aesthetic >= 6.25'; may be given again",
    )
    reading.add_argument(
        "--image-keys", type=lambda text: text.split(","), metavar="EXT,...", help="extensions of images"
    )
    reading.add_argument("--caption-key", metavar="EXT", help="extension of captions (default txt)")
    reading.add_argument(
        "--caption-field",
        type=_fields,
        metavar="NAME",
        help="field of the .json that has the caption, or NAME:WEIGHT,...",
    )
    encoding = parser.add_argument_group(
        "with --encode (split over processes by RANK and WORLD_SIZE, as torchrun sets them)"
    )
    encoding.add_argument(
        "--pipeline", type=path_argument, metavar="FOLDER", help="pipeline whose autoencoder and text encoders are used"
    )
    encoding.add_argument("--text", action="store_true", help="encode the captions too")
    encoding.add_argument("--variant", default="", help="of the pipeline's weight files, such as fp16")
    encoding.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="of what is stored (default bf16)"
    )
    encoding.add_argument(
        "--job", type=_job, default=(0, 1), metavar="I/N", help="encode part I of N, counted from 0: a job of an array"
    )
    encoding.add_argument("--batch", type=int, default=8, help="images encoded at once (default 8)")
    encoding.add_argument("--workers", type=int, default=0, help="processes that decode images (default 0: this one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    return parser
