"""Runs the convergence study, or what is left of it, and prints its tables.

    python -m benchmarks.convergence OUT [--profile quick|full] [--only digits/dmd ...] [--tables]

Needs the teachers of `make demo-digits` and, for the full profile, of `make demo`: run it in the folder that holds runs/ and
shards/. The quick profile takes a quarter of an hour on one core, the full one hours; either goes on where it was stopped, and
several processes may share the work by --only.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

from benchmarks.convergence.figure import draw
from benchmarks.convergence.pictures import emoji, photographs
from benchmarks.convergence.problem import Problem
from benchmarks.convergence.sigma import SigmaProblem
from benchmarks.convergence.store import Store
from benchmarks.convergence.study import PROFILES, Runs
from benchmarks.convergence.tables import overview, shares, table, with_recordings
from benchmarks.convergence.text import TextProblem
from trainer.config.load import load_settings
from trainer.config.schema import RunSettings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def demo(name: str) -> RunSettings:
    settings = load_settings(CONFIGS / f"{name}.yaml", [])
    if not Path(settings.evaluate.classifier, "model.safetensors").exists():
        sys.exit(f"{settings.run}: no teacher and classifier yet: run `disback demo {name}` here first")
    return settings


def problem(name: str, folder: Path) -> Problem:
    if name in ("digits", "emoji"):
        return TextProblem(name, demo(name))
    pictures = photographs() if name == "photographs" else emoji(demo("emoji"))
    found = SigmaProblem(name, *pictures, folder)
    scores = found.sampled(18)
    print(f"{name}: its teacher, 18 Heun steps: FID {scores['fid']:.3f}, pixel FD {scores['pixel_fd']:.2f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--only", nargs="+", default=[], metavar="PROBLEM/PART", help="these parts only")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the curves of the methods")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.out, functools.cache(lambda name: problem(name, args.out)), args.tables)
    runs, drawn, walks = Runs(store.run), [], []
    for part in PROFILES[args.profile]:
        if args.only and f"{part.problem}/{part.name}" not in args.only:
            continue
        try:
            found = runs.of(part)
        except KeyError:
            print(f"{part.problem}, {part.name}: not complete\n", flush=True)
            continue
        chosen = {label: runs.chosen[part.problem, part.name, label] for label in part.rows}
        paid = with_recordings(found, chosen)
        print(f"\n{table(part, paid, chosen)}\n", flush=True)
        walks += shares(part, paid)
        if {"none", "walk"} <= found.keys():
            drawn.append((part, found))
    if walks:
        print(f"The walk over plain distillation\n\n{overview(walks)}")
    if args.figure and drawn:
        draw(drawn, args.figure)


if __name__ == "__main__":
    main()
