"""Reads a run's files: metrics, evaluations and the rows of the final table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from trainer.errors import UserError

LABELS = {"walk": "path", "warm": "warm", "none": "none"}


@dataclass(frozen=True)
class Row:
    """One line of the final table. train_seconds: of the teacher its training, of a generator recording (if it uses the
    path) and backtracking."""

    label: str
    sampling_steps: int
    generator_updates: int
    fid: float | None
    class_accuracy: float | None
    images: int | None
    train_seconds: float


class Results:
    """What a run folder holds. Everything may be missing but the configuration."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"{folder}: no config.yaml there: it is not a run's folder, or nothing has run in it yet")
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
        points = [(line["step"], line[key]) for line in self.lines(stage) if line.get(key) is not None]
        return [p[0] for p in points], [p[1] for p in points]

    def evaluation(self, what: str) -> dict | None:
        file = self.folder / "eval" / what / "metrics.json"
        return json.loads(file.read_text()) if file.exists() else None

    def evaluations_over_steps(self) -> list[tuple[int, dict]]:
        names = sorted(p.parent.name for p in (self.folder / "eval").glob("step-????????/metrics.json"))
        return [(int(name[5:]), self.evaluation(name)) for name in names]

    def seconds(self, stage: str) -> float:
        """Training time of a stage that this run, or the run that made its pipeline or path, went through."""
        roots = {
            "record": self.config["path"],
            "pretrain": self.config["pipeline"],
            "autoencoder": self.config["pipeline"],
        }
        owner = Path(roots[stage]).parent if roots.get(stage) else self.folder
        times = Results(owner).curve(stage, "time")[1] if (owner / "config.yaml").exists() else []
        return times[-1] if times else 0.0

    def grids(self, stage: str) -> list[tuple[int, Path]]:
        files = sorted((self.folder / stage / "samples").glob("step-*.png"))
        return [(int(f.stem[5:]), f) for f in files]

    def generator_row(self) -> Row | None:
        scores = self.evaluation("generator")
        if not scores:
            return None
        settings = self.config["backtrack"]
        seconds = self.seconds("backtrack") + (self.seconds("record") if settings["path"] != "none" else 0.0)
        updates = self.lines("backtrack")[-1]["step"] // settings["fake_updates"]
        return _row(self.label, 1, updates, scores, seconds)

    def other_rows(self) -> list[Row]:
        """The teacher with all its steps, and the untrained generator."""
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
    """Rows in the order teacher, start, none, warm, path; the first run brings teacher and start."""
    rows = runs[0].other_rows() + [row for run in runs if (row := run.generator_row())]
    order = ["teacher", "start", "none", "warm", "path"]
    return sorted(rows, key=lambda row: order.index(row.label))


def as_text(rows: list[Row]) -> str:
    """The table in plain text."""
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
