"""`disback shards`: builds, encodes, indexes and validates WebDataset shards."""

import argparse
import sys
from pathlib import Path

from data.shard_patterns import expand
from trainer.distributed.logs import no_progress_bars
from trainer.entry import Parser, exit_with, guarded
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
    made = build_from_folder(args.images, args.captions, args.out, args.per_shard)
    rejects = made["rejects"] or "none"
    print(f"{args.out}: {made['samples']} samples in {len(made['shards'])} shards; left out: {rejects}")


def index(args: argparse.Namespace) -> None:
    from data.shard_index import build_index, save_index

    for tar in expand(args.index, "--index"):
        built = build_index(tar)
        if not save_index(built):
            raise UserError(f"--index: {tar.parent} cannot be written")
        print(f"{tar}: {len(built)} samples, members {', '.join(built.extensions)}")


def validate(args: argparse.Namespace) -> None:
    from data.validate import validate as check

    report = check(expand(args.validate, "--validate"), args.decode)
    print(
        f"{report['shards']} shards, {report['samples']} usable samples, {report['bytes'] / 1e6:.1f} MB, captions "
        f"of {report['caption_mean_length']:.0f} characters; rejected: {report['rejects'] or 'none'}"
    )
    if report["broken"]:
        raise UserError("; ".join(report["broken"].values()))


def encode(args: argparse.Namespace) -> None:
    if missing := [name for name in ("pipeline", "resolution", "out") if not getattr(args, name)]:
        raise UserError(f"--encode needs --{' and --'.join(missing)}")
    if args.resolution < 8 or args.batch < 1 or args.workers < 0:
        raise UserError("--encode: --resolution is at least 8, --batch at least 1, --workers at least 0")
    from trainer.encode import Encoding, Part, encode_shards

    paths, part = expand(args.encode, "--encode"), Part.of_environment()
    no_progress_bars()
    encoding = Encoding(Path(args.pipeline), args.resolution, args.text, args.precision, args.variant, part.device)
    encode_shards(paths, args.out, encoding, part, args.batch, args.workers)


ACTIONS = {"emoji": emoji, "digits": digits, "images": images, "index": index, "validate": validate, "encode": encode}


def _parser() -> Parser:
    parser = Parser(prog="disback shards", description="Builds, encodes, indexes and validates WebDataset shards.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--emoji", action="store_true", help="captioned colour emoji (OpenMoji), for the demo")
    what.add_argument(
        "--digits", action="store_true", help="scikit-learn's 1,797 handwritten digits, for the small demo"
    )
    what.add_argument("--images", type=Path, metavar="DIR", help="every image below a folder, with its caption")
    what.add_argument(
        "--index", metavar="SHARDS", help="(re)build the index of a folder, glob or brace pattern of tars"
    )
    what.add_argument("--validate", metavar="SHARDS", help="count samples and rejects; fails where a shard is broken")
    what.add_argument("--encode", metavar="SHARDS", help="latents (and text states) of shards as new shards in --out")
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="with --images: .json, .jsonl or .tsv of captions"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write into (default for --emoji and --digits: shards/emoji, shards/digits)"
    )
    parser.add_argument("--per-shard", type=int, default=1000, help="samples per shard (default 1000)")
    parser.add_argument("--decode", action="store_true", help="with --validate: decode every image too")
    encoding = parser.add_argument_group(
        "with --encode (split over processes by RANK and WORLD_SIZE, as torchrun sets them)"
    )
    encoding.add_argument("--pipeline", metavar="FOLDER", help="pipeline whose autoencoder and text encoders are used")
    encoding.add_argument("--resolution", type=int, help="side of the square images in pixels, as data.resolution")
    encoding.add_argument("--text", action="store_true", help="encode the captions too")
    encoding.add_argument("--variant", default="", help="of the pipeline's weight files, such as fp16")
    encoding.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="of what is stored (default bf16)"
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
        if args.captions and not args.images:
            raise UserError("--captions FILE goes with --images DIR")
        chosen = [action for name, action in ACTIONS.items() if getattr(args, name)]
        if not chosen:
            raise UserError(f"say what to do: --{', --'.join(ACTIONS)} (see --help)")
        chosen[0](args)

    return guarded(go, "--debug" in argv)


if __name__ == "__main__":
    exit_with(main)
