"""`disback demo`: the whole method on a small data set, from shards to report."""

from pathlib import Path

from trainer.entry import exit_with
from trainer.errors import UserError
from trainer.sequence import Experiment, Part, Task, exit_code, is_made, run_tasks, verbs_parser

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Seconds of each part on two CPU cores (emoji with two processes, digits with one), for the time left. On other machines only
# their ratios count.
SECONDS = {
    "emoji": dict(shards=13, autoencoder=115, teacher=293, record=23, backtrack=71, ablation=31, evaluate=75, report=4),
    "digits": dict(shards=4, autoencoder=38, teacher=98, record=11, backtrack=22, ablation=15, evaluate=32, report=3),
}


def plan(name: str, overrides: list[str]) -> tuple[Path, list[Task]]:
    """The main run's folder, and the demo's verbs in order. Raises UserError for a wrong override."""
    kinds = {"path": name, "none": f"{name}_none", "warm": f"{name}_warm"}
    main, none, warm = (Experiment(kind, CONFIGS / f"{file}.yaml", overrides) for kind, file in kinds.items())
    if len({main.folder, none.folder, warm.folder}) < 3:
        raise UserError("the demo has three run folders: leave `run` as it is, and start it in another folder instead")
    cost, settings, folder = SECONDS[name], main.settings, main.folder
    autoencoder = main.training("autoencoder", cost["autoencoder"], "autoencoder", settings.pretrain.autoencoder.steps)
    teacher = main.training("teacher", cost["teacher"], "pretrain", settings.pretrain.steps)
    record = main.training("record", cost["record"], "record", settings.record.steps)
    return folder, [
        Task("shards", [f"--{name}"], [Part("shards", cost["shards"])], alone=True),
        main.task("pretrain", lambda: is_made(main.teacher), autoencoder, teacher),
        main.task("record", lambda: is_made(main.path, main.teacher), record),
        *(experiment.backtrack(cost["backtrack"]) for experiment in (main, none, warm)),
        *(experiment.evaluate(cost["ablation"]) for experiment in (none, warm)),
        main.evaluate(cost["evaluate"], "evaluate.what=[teacher, start, generator]"),
        Task(
            "report",
            ["--config", str(main.file), *overrides],
            [Part("report", cost["report"])],
            alone=True,
            prints=True,
        ),
    ]


def demo(argv: list[str]) -> int:
    parser = verbs_parser("demo", "The whole method on a small data set, from shards to report.")
    parser.add_argument("name", nargs="?", default="emoji", help="emoji (the default) or digits")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings for every verb")
    args = parser.parse_intermixed_args(argv)
    if "=" in args.name:
        args.name, args.overrides = "emoji", [args.name, *args.overrides]
    if args.name not in SECONDS:
        raise UserError(f"the demos are {' and '.join(SECONDS)} (see disback demo --help)")
    folder, tasks = plan(args.name, args.overrides)
    return run_tasks("demo", folder, tasks, args)


def main(argv: list[str] | None = None) -> int:
    return exit_code(demo, argv)


if __name__ == "__main__":
    exit_with(main)
