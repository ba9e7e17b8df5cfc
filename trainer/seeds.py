"""`disback seeds CONFIG... --seeds 1 2 3`: several methods with several seeds from one command, and their comparison.

A seed's runs stand beside the configuration's run folder, as RUN-seed-1. They share its teacher; a path is recorded once per
seed, for all configurations that name the same `path`.
"""

from pathlib import Path

from trainer.config.load import load_settings
from trainer.entry import exit_with
from trainer.errors import UserError
from trainer.sequence import Experiment, Part, Task, exit_code, is_made, run_tasks, verbs_parser

SECONDS = {"step": 0.1, "evaluate": 30.0, "compare": 2.0}  # for the time left; how fast they really are is seen


def experiment(config: Path, seed: int, overrides: list[str], folders: list[Path]) -> Experiment:
    """A configuration's run with a seed. folders: the run folders of all configurations, without seeds. A path that belongs to
    the run of another one is that run's; else it is recorded in this run."""
    settings = load_settings(config, overrides)
    owner = settings.path_folder.parent
    owner = owner if owner in folders else settings.folder
    own = [f"run={settings.run}-seed-{seed}", f"path={owner}-seed-{seed}/path", f"seed={seed}"]
    shared = [f"pipeline={settings.pipeline or settings.folder / 'pipeline'}"]
    if not settings.evaluate.classifier:
        shared.append(f"evaluate.classifier={settings.folder / 'classifier'}")
    return Experiment(f"{config.stem}, seed {seed}", config, [*overrides, *own, *shared])


def records(run: Experiment) -> bool:
    """Whether a run uses a path that is its own."""
    settings = run.settings
    return settings.backtrack.path != "none" and settings.path_folder.parent == run.folder


def tasks_of(run: Experiment) -> list[Task]:
    """Recording if the path is the run's own, backtracking, and the scores of its checkpoints."""
    settings, tasks = run.settings, []
    if records(run):
        seconds = settings.record.steps * SECONDS["step"]
        part = run.training(f"record {run.kind}", seconds, "record", settings.record.steps)
        tasks.append(run.task("record", lambda: is_made(run.path), part))
    tasks.append(run.backtrack(settings.backtrack.steps * SECONDS["step"]))
    tasks.append(run.evaluate(SECONDS["evaluate"]))
    return tasks


def seeds(argv: list[str]) -> int:
    parser = verbs_parser("seeds", "Several methods with several seeds, and what their scores cost.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="a configuration per method")
    parser.add_argument("--seeds", nargs="+", type=int, required=True, metavar="SEED")
    args, rest = parser.parse_known_intermixed_args(argv)
    files = [Path(name) for name in args.configs if "=" not in name]
    overrides = [*(name for name in args.configs if "=" in name), *rest]
    if wrong := [text for text in rest if "=" not in text]:
        raise UserError(f"unknown option {wrong[0]} (see disback seeds --help)")
    if not files:
        raise UserError("name a configuration, such as configs/digits.yaml")
    bare = [load_settings(file, overrides).folder for file in files]
    if len(set(bare)) < len(bare):
        raise UserError("two of the configurations have the same run folder: give each its own `run`")
    per_seed = [[experiment(file, seed, overrides, bare) for file in files] for seed in dict.fromkeys(args.seeds)]
    runs = [run for each in per_seed for run in each]
    tasks = [task for each in per_seed for run in sorted(each, key=records, reverse=True) for task in tasks_of(run)]
    folders = [str(run.folder) for each in zip(*per_seed, strict=True) for run in each]
    compared = [*folders, f"--folder={runs[0].settings.evaluate.folder}"]
    tasks.append(Task("compare", compared, [Part("compare", SECONDS["compare"])], alone=True, prints=True))
    return run_tasks("seeds", runs[0].folder, tasks, args)


def main(argv: list[str] | None = None) -> int:
    return exit_code(seeds, argv)


if __name__ == "__main__":
    exit_with(main)
