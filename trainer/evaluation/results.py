"""A run's results, read from its files: metrics, evaluations and the rows of the final table. No torch."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from trainer.checkpoint.directory import by_step, step_name
from trainer.errors import UserError

LABELS = {"walk": "path", "warm": "warm", "none": "none"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the final table. compute: forward-equivalents of training, in batches of this run, and train_seconds: its
    time; for the teacher those of pretraining; for a generator those of backtracking, plus recording if it uses the path.
    The fields with a default are those of eval/*/metrics.json."""

    label: str
    sampling_steps: int
    generator_updates: int
    compute: float | None
    fid: float | None = None
    kid: float | None = None
    pixel_fd: float | None = None
    precision: float | None = None
    recall: float | None = None
    class_accuracy: float | None = None
    colour_accuracy: float | None = None
    heldout_class_accuracy: float | None = None
    heldout_colour_accuracy: float | None = None
    images: int | None = None
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

    def prompt_images(self, what: str) -> tuple[Path, dict] | None:
        """The row of images that an evaluation made of `sample.prompts`, and the settings that say how."""
        folder = self.folder / "eval" / what
        if not (folder / "prompts.png").exists():
            return None
        return folder / "prompts.png", yaml.safe_load((folder / "settings.yaml").read_text())

    def evaluations_over_steps(self) -> list[tuple[int, dict]]:
        """Steps and metrics of the checkpoints that were evaluated."""
        folders = by_step(self.folder / "eval").items()
        return [(step, scores) for step, folder in folders if (scores := self.evaluation(folder.name))]

    def training(self, stage: str, step: int | None = None) -> tuple[float | None, float]:
        """Compute, None if it is not known, and seconds of a stage, up to a step, of this run or of the run that its pipeline
        or path comes from."""
        roots = {
            "record": self.config["path"],
            "pretrain": self.config["pipeline"],
            "autoencoder": self.config["pipeline"],
        }
        folder = Path(roots[stage]).parent if roots.get(stage) else self.folder
        if not (folder / "config.yaml").exists():
            return None, 0.0
        owner = Results(folder)
        lines = [line for line in owner.lines(stage) if step is None or line["step"] <= step]
        last = lines[-1] if lines else {}
        compute = last.get("compute")
        if compute is not None:  # its unit is a batch of the run that trained
            compute *= owner.config["backtrack"]["batch"] / self.config["backtrack"]["batch"]
        return compute, last.get("time") or 0.0

    def grids(self, stage: str) -> list[tuple[int, Path]]:
        """Steps and files of a stage's sample grids."""
        return list(by_step(self.folder / stage / "samples", ".png").items())

    @property
    def student_steps(self) -> int:
        """Sampling steps of the generator."""
        return len(self.config["backtrack"].get("student_timesteps", [])) or 1

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
        return _row(self.label, self.student_steps, updates, parts, scores)

    def other_rows(self) -> list[Row]:
        """The teacher, sampled with all its steps, and the untrained generator."""
        rows = []
        if scores := self.evaluation("teacher"):
            parts = [self.training("pretrain"), (0.0, self.training("autoencoder")[1])]  # compute of denoisers only
            rows.append(_row("teacher", self.config["sample"]["steps"], 0, parts, scores))
        if scores := self.evaluation("start"):
            rows.append(_row("start", self.student_steps, 0, [], scores))
        return rows


def _row(label: str, steps: int, updates: int, parts: list[tuple[float | None, float]], scores: dict) -> Row:
    """A row from the compute and the seconds of its training's parts, and from its metrics."""
    known = [compute for compute, _ in parts if compute is not None]
    compute = round(sum(known), 1) if len(known) == len(parts) else None
    seconds = round(sum(seconds for _, seconds in parts), 1)
    shown = {field.name: scores.get(field.name) for field in fields(Row) if field.default is None}
    return Row(
        label=label, sampling_steps=steps, generator_updates=updates, compute=compute, train_seconds=seconds, **shown
    )


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
    "heldout_class_accuracy": ("class, new", ".3f"),
    "heldout_colour_accuracy": ("colour, new", ".3f"),
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


def explanation(run: Results) -> str:
    """What the table's columns are, in sentences; empty without an evaluation."""
    scores = run.evaluation("generator") or run.evaluation("teacher")
    if not scores:
        return ""
    text = (
        f"Features and accuracies: {scores['features']}. Reference: {scores['reference']}. Pixel FD: Frechet distance on "
        "principal components of the pixels. Compute: forward passes of the denoiser on one batch; a run without recording "
        "stands there at equal updates and, trained on, at equal compute."
    )
    if scores.get("heldout_class_accuracy") is not None:
        text += ' "new": combinations of object and colour that training did not show.'
    if scores.get("credit"):
        text += f" Training images: {scores['credit']}."
    return text


def as_json(rows: list[Row]) -> str:
    return json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
