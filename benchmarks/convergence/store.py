"""Finished runs, one JSON line each: a study that was stopped goes on, and what it has is never computed again."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.convergence.problem import Problem
from benchmarks.convergence.recipes import Recipe
from benchmarks.convergence.train import distil


class Store:
    """problems: by name, built when first needed. Several processes may write to one folder: each run is appended to its
    problem's file as one line."""

    def __init__(self, folder: Path, problem: Callable[[str], Problem], only_known: bool = False):
        self.folder, self.problem, self.only_known = folder, problem, only_known
        self.found: dict[tuple[str, Recipe, int, int], list[dict]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("runs-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    run = json.loads(line)
                except ValueError:  # its process was killed while it wrote
                    continue
                recipe, marks = Recipe.from_json(run["recipe"]), run.get("marks", len(run["points"]) - 1)
                self.found[run["problem"], recipe, run["seed"], marks] = run["points"]

    def run(self, problem: str, recipe: Recipe, seed: int, points: int) -> list[dict]:
        """The points of a run. Raises KeyError for one that is not there, if only known ones are wanted."""
        key = problem, recipe, seed, points
        if key not in self.found:
            if self.only_known:
                raise KeyError(key)
            began = time.monotonic()
            self.found[key] = list(distil(self.problem(problem), recipe, seed, points))
            line = {
                "problem": problem,
                "recipe": recipe.as_json(),
                "seed": seed,
                "marks": points,
                "points": self.found[key],
            }
            with (self.folder / f"runs-{problem}.jsonl").open("a") as file:
                file.write("\n" * bool(file.tell()) + json.dumps(line))  # a line that was cut off stays alone
            last = self.found[key][-1]
            about = f"{recipe.method} {recipe.objective}, rates {recipe.lr:g} / {recipe.fake_lr:g}, seed {seed}"
            scores = f"FID {last['fid']:.3f}, pixel FD {last['pixel_fd']:.2f}"
            print(f"{problem}: {about}: {scores} at {last['compute']} in {time.monotonic() - began:.0f} s", flush=True)
        return self.found[key]
