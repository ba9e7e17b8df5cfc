"""A run's results, read from its files: metrics, evaluations and the rows of the final table. No torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from trainer.checkpoint.directory import by_step, step_name
from trainer.errors import UserError

LABELS = {"walk": "path", "warm": "warm", "none": "none"}


SCORES = (
    "fid kid pixel_fd precision recall class_accuracy colour_accuracy heldout_class_accuracy heldout_colour_accuracy"
).split()


@dataclass(frozen=True)
class Row:
    """One line of the final table. compute: forward-equivalents of training, and train_seconds: its time; for the teacher
    those of pretraining; for a generator those of backtracking, plus recording if it uses the path. The scores from `fid`
    on are those of eval/*/metrics.json."""

    label: str
    sampling_steps: int
    generator_updates: int
    compute: float | None
    fid: float | None
    kid: float | None
    pixel_fd: float | None
    precision: float | None
    recall: float | None
    class_accuracy: float | None
    colour_accuracy: float | None
    heldout_class_accuracy: float | None
    heldout_colour_accuracy: float | None
    images: int | None
    train_seconds: float


class Results:
    """The results in a run folder. Only config.yaml is required; all else may be missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"{folder}: has no config.yaml: it is not a run folder, or nothing has run in it yet")
        self.config = yaml.safe_load(file.read_text())

    @property
    def label(self) -> str:
        return LABELS[self.config["backtrack"]["path"]]

    def lines(self, stage: str) -> list[dict]:
        """The metrics lines of a stage, oldest first."""
        file = self.folder / stage / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]

    def curve(self, stage: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it is not null."""
        points = [(line["step"], line[key]) for line in self.lines(stage) if line.get(key) is not None]
        return [p[0] for p in points], [p[1] for p in points]

    def evaluation(self, what: str) -> dict | None:
        """The metrics of an evaluation, such as that of "generator"."""
        file = self.folder / "eval" / what / "metrics.json"
        return json.loads(file.read_text()) if file.exists() else None

    def evaluations_over_steps(self) -> list[tuple[int, dict]]:
        """Steps and metrics of the checkpoints that were evaluated."""
        folders = by_step(self.folder / "eval").items()
        return [(step, scores) for step, folder in folders if (scores := self.evaluation(folder.name))]

    def training(self, stage: str, step: int | None = None) -> tuple[float, float]:
        """Compute and seconds of a stage, up to a step, of this run or of the run that its pipeline or path comes from."""
        roots = {
            "record": self.config["path"],
            "pretrain": self.config["pipeline"],
            "autoencoder": self.config["pipeline"],
        }
        owner = Path(roots[stage]).parent if roots.get(stage) else self.folder
        lines = Results(owner).lines(stage) if (owner / "config.yaml").exists() else []
        last = next((line for line in reversed(lines) if step is None or line["step"] <= step), {})
        return last.get("compute") or 0.0, last.get("time") or 0.0

    def grids(self, stage: str) -> list[tuple[int, Path]]:
        """Steps and files of a stage's sample grids."""
        return list(by_step(self.folder / stage / "samples", ".png").items())

    @property
    def last_step(self) -> int:
        """Of the generator's training; 0 before its first metrics line."""
        lines = self.lines("backtrack")
        return lines[-1]["step"] if lines else 0

    def generator_row(self, step: int | None = None) -> Row | None:
        """The row of the generator, or of the checkpoint of a step; None if it was not evaluated."""
        scores = self.evaluation("generator" if step is None else step_name(step))
        if not scores:
            return None
        settings = self.config["backtrack"]
        parts = [self.training("backtrack", step)]
        if settings["path"] != "none":
            parts.append(self.training("record"))
        updates = (step or self.last_step) // settings["fake_updates"]
        return _row(self.label, len(settings.get("student_timesteps", [])) or 1, updates, parts, scores)

    def other_rows(self) -> list[Row]:
        """The teacher, sampled with all its steps, and the untrained generator."""
        rows = []
        if scores := self.evaluation("teacher"):
            parts = [self.training("pretrain"), self.training("autoencoder")]
            rows.append(_row("teacher", self.config["sample"]["steps"], 0, parts, scores))
        if scores := self.evaluation("start"):
            rows.append(_row("start", 1, 0, [], scores))
        return rows


def _row(label: str, steps: int, updates: int, parts: list[tuple[float, float]], scores: dict) -> Row:
    """A row from the compute and the seconds of its training's parts, and from its metrics."""
    compute, seconds = (round(sum(part[i] for part in parts), 1) for i in range(2))
    shown = {name: scores.get(name) for name in SCORES}
    return Row(label, steps, updates, compute, images=scores["images"], train_seconds=seconds, **shown)


def table(runs: list[Results]) -> list[Row]:
    """Rows in the order teacher, start, none, warm, path. Teacher and start are those of the first run. A run that trained
    for longer than the first one, as one without a recording may at equal compute, has a second row: its checkpoint at
    the first run's last step, if that was evaluated."""
    first = runs[0]
    rows = first.other_rows()
    for run in runs:
        steps = [first.last_step, None] if run.last_step > first.last_step else [None]
        rows += [row for step in steps if (row := run.generator_row(step))]
    order = ["teacher", "start", "none", "warm", "path"]
    return sorted(rows, key=lambda row: order.index(row.label))


COLUMNS = {
    "sampling_steps": ("steps/image", "d"),
    "generator_updates": ("updates", "d"),
    "compute": ("compute", ".0f"),
    "fid": ("FID", ".2f"),
    "kid": ("KID", ".3f"),
    "pixel_fd": ("pixel FD", ".2f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "class_accuracy": ("class", ".3f"),
    "colour_accuracy": ("colour", ".3f"),
    "heldout_class_accuracy": ("new class", ".3f"),
    "heldout_colour_accuracy": ("new colour", ".3f"),
    "images": ("images", "d"),
    "train_seconds": ("train, s", ".0f"),
}


def cells(rows: list[Row]) -> list[list[str]]:
    """The table as text, the heads first; without the columns that no row has a value for."""
    used = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    body = [[_cell(getattr(row, name), COLUMNS[name][1]) for name in used] for row in rows]
    return [["", *(COLUMNS[name][0] for name in used)], *([r.label, *line] for r, line in zip(rows, body, strict=True))]


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def as_text(rows: list[Row]) -> str:
    """The table as plain text."""
    table = cells(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(f"{c:{'<' if i == 0 else '>'}{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in table
    ]
    return "\n".join(lines)


def as_json(rows: list[Row]) -> str:
    return json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
