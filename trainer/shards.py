"""`disback shards`: builds, encodes, indexes and validates WebDataset shards."""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

from pydantic import ValidationError

from data.settings import DataSettings
from data.shard_patterns import expand, not_read
from trainer.distributed.group import set_environment
from trainer.distributed.launchers import end_with_launcher
from trainer.distributed.logs import no_progress_bars
from trainer.entry import Parser, exit_with, guarded, path_argument, pattern_argument
from trainer.errors import UserError

# Each action imports what it alone needs: only --validate and --encode load torch.


def digits(args: argparse.Namespace) -> None:
    from data.digits import build_digits

    out = args.out or Path("shards/digits")
    print(_counted(out, build_digits(out, args.seed)))


def emoji(args: argparse.Namespace) -> None:
    from data.emoji import CREDIT, build_emoji

    out = args.out or Path("shards/emoji")
    print(f"{_counted(out, build_emoji(out, args.seed))}. Emoji: {CREDIT}")


def _counted(out: Path, counts: dict[str, int]) -> str:
    return f"{out}: " + ", ".join(f"{count} {name} samples" for name, count in counts.items())


def images(args: argparse.Namespace) -> None:
    from data.image_folder import build_from_folder

    if not args.out:
        raise UserError("--images needs --out DIR, the folder for the shards")
    if args.per_shard < 1:
        raise UserError(f"--per-shard {args.per_shard}: must be at least 1")
    say = partial(print, flush=True)
    made = build_from_folder(args.images, args.captions, args.out, args.per_shard, args.processes, say)
    kept = f" ({made['kept']} of them from before)" if made["kept"] else ""
    print(
        f"{args.out}: {made['samples']} samples in {len(made['shards'])} shards{kept}; left out: {made['rejects'] or 'none'}; "
        f"not read: {made['ignored'] or 'nothing'}"
    )


def index(args: argparse.Namespace) -> None:
    from data.shard_index import build_index, save_index

    for tar in expand(args.index, "--index"):
        built = build_index(tar)
        if not save_index(built):
            raise UserError(f"--index: {tar.parent} cannot be written")
        print(f"{tar}: {len(built)} samples, members {', '.join(built.extensions)}")


def validate(args: argparse.Namespace) -> None:
    from data.validate import validate as check

    paths, settings = expand(args.validate, "--validate"), _data_settings(args)
    if args.repair:
        _repair(args, paths, settings)
        return
    tokens = _token_counter(args)
    report = check(paths, args.decode, settings, args.processes, tokens or len)
    print(
        f"{report['shards']} shards, {report['samples']} usable samples, {report['bytes'] / 1e6:.1f} MB, captions "
        f"of {report['caption_mean_length']:.0f} characters; rejected: {report['rejects'] or 'none'}"
    )
    if report["empty"]:
        print(f"empty shards: {', '.join(report['empty'])}")
    _print_table(report, "tokens" if tokens else "characters", tokens.limit if tokens else 0)
    _tell_not_read(args.validate)
    if report["broken"]:
        raise UserError("; ".join(report["broken"].values()))
    if not report["samples"]:
        raise UserError(f"--validate {args.validate}: no usable sample: build the shards again")
    lost, limit = sum(report["rejects"].values()), settings.max_rejected
    if lost > limit * (lost + report["samples"]):
        raise UserError(
            f"--validate {args.validate}: {lost} of {lost + report['samples']} samples are unusable: see above"
        )


def _print_table(report: dict, unit: str, limit: int) -> None:
    """The report's counts, a line each. limit: tokens that the text encoders read, 0 if unknown."""
    for title, counts in (
        ("rejected, by reason", dict(sorted(report["rejects"].items(), key=lambda item: -item[1]))),
        ("short side in pixels", report["sizes"]),
        ("width : height", report["aspects"]),
    ):
        if counts:
            print(f"{title}:")
            for name, count in counts.items():
                print(f"  {count:>12,}  {name}")
    lengths = report["caption_lengths"]
    if lengths:
        shown = ", ".join(f"{share:.0%} up to {_quantile(lengths, share)}" for share in (0.5, 0.95, 1.0))
        over = sum(count for length, count in lengths.items() if length > limit)
        print(f"captions in {unit}: {shown}" + (f"; {over} exceed the encoders' {limit} and are cut" if limit else ""))


def _quantile(lengths: dict[int, int], share: float) -> int:
    """The length that this share of the captions does not exceed."""
    reached, wanted = accumulate(lengths.values()), share * sum(lengths.values())
    return next(length for length, count in zip(lengths, reached, strict=True) if count >= wanted)


def _token_counter(args: argparse.Namespace) -> Callable[[str], int] | None:
    if not args.pipeline:
        return None
    from models.tokenizer import TokenCounter

    return TokenCounter(args.pipeline)


def _repair(args: argparse.Namespace, paths: list[Path], settings: DataSettings) -> None:
    from data.repair import repair

    copies = repair(paths, args.repair, settings, args.processes)
    for path, (count, left_out) in copies.items():
        print(
            f"{path} -> {args.repair / path.name if count else 'nothing'}: {count} samples; left out: {left_out or 'none'}"
        )
    if not any(count for count, _ in copies.values()):
        raise UserError(f"--repair {args.repair}: no usable sample in these shards: build them again")


def _data_settings(args: argparse.Namespace) -> DataSettings:
    """The `data` section of --config, if there is one, under the options."""
    if args.resolution is not None and args.resolution < 8:
        raise UserError(f"--resolution {args.resolution}: must be at least 8")
    base = {}
    if args.config:
        from trainer.config.load import load_settings

        base = load_settings(args.config, []).data.model_dump()
    given = {key: value for key in DATA_OPTIONS if (value := getattr(args, key)) is not None}
    try:
        return DataSettings(**base | given)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{first['loc'][0].replace('_', '-')}: " if first["loc"] else ""
        raise UserError(option + first["msg"].removeprefix("Value error, ")) from error


def _tell_not_read(patterns: str) -> None:
    if found := not_read(patterns):
        print(f"not read: {dict(found)}")


def encode(args: argparse.Namespace) -> None:
    needed = ("pipeline", "out") if args.config else ("pipeline", "resolution", "out")
    if missing := [name for name in needed if not getattr(args, name)]:
        raise UserError(f"--encode needs --{' and --'.join(missing)}")
    if args.batch < 1 or args.workers < 0:
        raise UserError("--encode: --batch is at least 1, --workers at least 0")
    data = _data_settings(args)
    set_environment()
    end_with_launcher()
    from trainer.encode import Encoding, Part, encode_shards

    paths, part = expand(args.encode, "--encode"), Part.of_environment(*args.job)
    no_progress_bars()
    encoding = Encoding(args.pipeline, data, args.text, args.precision, args.variant, part.device)
    if part.rank == 0:
        _tell_not_read(args.encode)
    encode_shards(paths, args.out, encoding, part, args.batch, args.workers)


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
ACTIONS = {"emoji": emoji, "digits": digits, "images": images, "index": index, "validate": validate, "encode": encode}


def _parser() -> Parser:
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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def go() -> None:
        args = _parser().parse_args(argv)
        if args.processes < 1:
            raise UserError(f"--processes {args.processes}: must be at least 1")
        if args.repair and not args.validate:
            raise UserError("--repair OUT goes with --validate SHARDS")
        if args.captions and not args.images:
            raise UserError("--captions FILE goes with --images DIR")
        reading = (*DATA_OPTIONS, "config")
        if not (args.validate or args.encode) and any(getattr(args, key) is not None for key in reading):
            options = ", ".join(f"--{key.replace('_', '-')}" for key in reading).replace("--filters", "--filter")
            raise UserError(f"{options} go with --validate and --encode")
        if not 0 <= args.seed < 2**32:
            raise UserError(f"--seed {args.seed}: must be from 0 to {2**32 - 1}")
        chosen = [action for name, action in ACTIONS.items() if getattr(args, name)]
        if not chosen:
            raise UserError(f"say what to do: --{', --'.join(ACTIONS)} (see --help)")
        chosen[0](args)

    return guarded(go, "--debug" in argv)


if __name__ == "__main__":
    exit_with(main)
