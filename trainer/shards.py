"""`disback shards`: builds, encodes, indexes and validates WebDataset shards."""

import argparse
import sys
from pathlib import Path

import torch

from data.digits import build_digits
from data.image_folder import build_folder
from data.shard_index import build_index, save_index
from data.shard_patterns import expand
from data.validate import validate
from trainer.distributed.logs import no_progress_bars
from trainer.entry import Parser, guarded
from trainer.errors import UserError


def encode_with(args: argparse.Namespace) -> None:
    """`--encode`. Raises UserError for arguments that are missing or out of range."""
    from trainer.encode import Encoding, Part, encode_shards  # slow to import: building shards needs no networks

    if missing := [name for name in ("pipeline", "resolution", "out") if not getattr(args, name)]:
        raise UserError(f"--encode needs --{' and --'.join(missing)}")
    if args.resolution < 8 or args.batch < 1 or args.workers < 0:
        raise UserError("--encode: --resolution is at least 8, --batch at least 1, --workers at least 0")
    paths, part = expand(args.encode, "--encode"), Part.of_environment()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    no_progress_bars()
    encoding = Encoding(Path(args.pipeline), args.resolution, args.text, dtype, args.variant, part.device)
    encode_shards(paths, args.out, encoding, part, args.batch, args.workers)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="disback shards", description="Builds, encodes, indexes and validates WebDataset shards.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--digits", action="store_true", help="scikit-learn's 1,797 handwritten digits, for the demo")
    what.add_argument("--images", type=Path, metavar="DIR", help="every image below a folder, with its caption")
    what.add_argument(
        "--index", metavar="SHARDS", help="(re)build the index of a folder, glob or brace pattern of tars"
    )
    what.add_argument("--validate", metavar="SHARDS", help="count samples and rejects; fails where a shard is broken")
    what.add_argument("--encode", metavar="SHARDS", help="latents (and text states) of shards as new shards in --out")
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="with --images: .json, .jsonl or .tsv of captions"
    )
    parser.add_argument("--out", type=Path, help="folder to write into (default for --digits: shards/digits)")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples a shard (default 1000)")
    parser.add_argument("--decode", action="store_true", help="with --validate: decode every image too")
    encode = parser.add_argument_group(
        "with --encode (split over processes by RANK and WORLD_SIZE, as torchrun sets them)"
    )
    encode.add_argument("--pipeline", metavar="FOLDER", help="pipeline whose autoencoder and text encoders are used")
    encode.add_argument("--resolution", type=int, help="side of the square images in pixels, as data.resolution")
    encode.add_argument("--text", action="store_true", help="encode the captions too")
    encode.add_argument("--variant", default="", help="of the pipeline's weight files, such as fp16")
    encode.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="of what is stored (default bf16)"
    )
    encode.add_argument("--batch", type=int, default=8, help="images encoded at once (default 8)")
    encode.add_argument("--workers", type=int, default=0, help="processes that decode images (default 0: this one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    argv = sys.argv[1:] if argv is None else argv

    def go() -> None:
        args = parser.parse_args(argv)
        if args.captions and not args.images:
            raise UserError("--captions FILE goes with --images DIR")
        if args.digits:
            out = args.out or Path("shards/digits")
            counts = build_digits(out, args.seed)
            print(f"{out}: " + ", ".join(f"{count} {name} samples" for name, count in counts.items()))
        elif args.images:
            if not args.out:
                raise UserError("--images needs --out DIR, the folder for the shards")
            made = build_folder(args.images, args.captions, args.out, args.per_shard)
            left = made["rejects"] or "none"
            print(f"{args.out}: {made['samples']} samples in {len(made['shards'])} shards; left out: {left}")
        elif args.encode:
            encode_with(args)
        elif args.index:
            for tar in expand(args.index, "--index"):
                index = build_index(tar)
                if not save_index(index):
                    raise UserError(f"--index: {tar.parent} cannot be written")
                print(f"{tar}: {len(index)} samples, members {', '.join(index.extensions)}")
        elif args.validate:
            report = validate(expand(args.validate, "--validate"), args.decode)
            print(
                f"{report['shards']} shards, {report['samples']} usable samples, {report['bytes'] / 1e6:.1f} MB, captions "
                f"of {report['caption_mean_length']:.0f} characters; rejected: {report['rejects'] or 'none'}"
            )
            if report["broken"]:
                raise UserError("; ".join(report["broken"].values()))
        else:
            raise UserError(
                "say what to do: --digits, --images DIR, --encode, --index or --validate SHARDS (see --help)"
            )

    return guarded(go, "--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
