"""A run's results, read from its files: metrics, evaluations and the rows of the final table. No torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from trainer.checkpoint.directory import by_step
from trainer.errors import UserError

LABELS = {"walk": "path", "warm": "warm", "none": "none"}


@dataclass(frozen=True)
class Row:
    """One line of the final table. train_seconds: pretraining for the teacher; backtracking for a generator, plus
    recording if it uses the path."""

    label: str
    sampling_steps: int
    generator_updates: int
    fid: float | None
    class_accuracy: float | None
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

    def seconds(self, stage: str) -> float:
        """Training time of a stage, of this run or of the run that its pipeline or path comes from."""
        roots = {
            "record": self.config["path"],
            "pretrain": self.config["pipeline"],
            "autoencoder": self.config["pipeline"],
        }
        owner = Path(roots[stage]).parent if roots.get(stage) else self.folder
        times = Results(owner).curve(stage, "time")[1] if (owner / "config.yaml").exists() else []
        return times[-1] if times else 0.0

    def grids(self, stage: str) -> list[tuple[int, Path]]:
        """Steps and files of a stage's sample grids."""
        return list(by_step(self.folder / stage / "samples", ".png").items())

    def generator_row(self) -> Row | None:
        scores = self.evaluation("generator")
        if not scores:
            return None
        settings = self.config["backtrack"]
        seconds = self.seconds("backtrack") + (self.seconds("record") if settings["path"] != "none" else 0.0)
        updates = self.lines("backtrack")[-1]["step"] // settings["fake_updates"]
        return _row(self.label, 1, updates, scores, seconds)

    def other_rows(self) -> list[Row]:
        """The teacher, sampled with all its steps, and the untrained generator."""
        rows = []
        if scores := self.evaluation("teacher"):
            seconds = self.seconds("pretrain") + self.seconds("autoencoder")
            rows.append(_row("teacher", self.config["sample"]["steps"], 0, scores, seconds))
        if scores := self.evaluation("start"):
            rows.append(_row("start", 1, 0, scores, 0.0))
        return rows


def _row(label: str, steps: int, updates: int, scores: dict, seconds: float) -> Row:
    return Row(label, steps, updates, scores["fid"], scores["class_accuracy"], scores["images"], round(seconds, 1))


def table(runs: list[Results]) -> list[Row]:
    """Rows in the order teacher, start, none, warm, path. Teacher and start are those of the first run."""
    rows = runs[0].other_rows() + [row for run in runs if (row := run.generator_row())]
    order = ["teacher", "start", "none", "warm", "path"]
    return sorted(rows, key=lambda row: order.index(row.label))


def as_text(rows: list[Row]) -> str:
    """The table as plain text."""
    lines = [f"{'':8} {'steps/image':>11} {'updates':>8} {'FID':>8} {'class acc.':>10} {'images':>7} {'train':>7}"]
    for r in rows:
        fid = f"{r.fid:8.2f}" if r.fid is not None else f"{'-':>8}"
        accuracy = f"{r.class_accuracy:10.4f}" if r.class_accuracy is not None else f"{'-':>10}"
        lines.append(
            f"{r.label:8} {r.sampling_steps:11d} {r.generator_updates:8d} {fid} {accuracy} {r.images:7d} {r.train_seconds:6.0f}s"
        )
    return "\n".join(lines)


def as_json(rows: list[Row]) -> str:
    return json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
