"""The `disback` command: `disback VERB ...` is `python -m trainer.VERB ...`."""

import importlib
import sys
from typing import NoReturn

from trainer import VERSION
from trainer.entry import USER_MISTAKE, exit_with

VERBS = {
    "demo": "the whole method on a small data set: emoji (default) or digits",
    "shards": "build, encode, index and validate WebDataset shards",
    "pretrain": "train or fine-tune a teacher on shards",
    "plan": "memory, disk and time of a run, before any weight is loaded",
    "record": "stage 1: record the degradation path",
    "backtrack": "stage 2: distil a one-step generator along the path",
    "sample": "prompts to images",
    "evaluate": "score a generator against real images",
    "export": "write a one-step diffusers pipeline",
    "report": "one HTML page of a run",
    "compare": "what scores cost, over seeds and at equal compute",
    "seeds": "train several methods with several seeds, and compare them",
    "status": "where a run stands, from its files alone",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: disback VERB --config FILE.yaml [key.sub=value ...]\n")
        print("\n".join(f"  {verb:10} {about}" for verb, about in VERBS.items()))
        print("\ndisback VERB --help lists its options. Across processes: deepspeed --module trainer.VERB --config ...")
        return 0 if argv else USER_MISTAKE
    if argv[0] == "--version":
        print(VERSION)
        return 0
    if argv[0] not in VERBS:
        print(f"disback: unknown verb '{argv[0]}': one of {', '.join(VERBS)}", file=sys.stderr)
        return USER_MISTAKE
    return importlib.import_module(f"trainer.{argv[0]}").main(argv[1:])


def run() -> NoReturn:
    exit_with(main)


if __name__ == "__main__":
    run()
