"""`disback shards`: builds, encodes, indexes and validates WebDataset shards."""

import argparse
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
from trainer.entry import exit_with, guarded
from trainer.errors import UserError
from trainer.shard_options import DATA_OPTIONS, shards_parser

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


ACTIONS = {"emoji": emoji, "digits": digits, "images": images, "index": index, "validate": validate, "encode": encode}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def go() -> None:
        args = shards_parser().parse_args(argv)
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
