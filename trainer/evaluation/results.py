"""A run's results, read from its files: settings, metrics lines, evaluations, sample grids. No torch, no numpy."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import yaml

from trainer.checkpoint.directory import by_step, step_name
from trainer.errors import UserError

LABELS = {"walk": "path", "warm": "warm", "none": "none"}
SCORES = (
    "fid patch_fid kid pixel_fd fd_dinov2 cmmd precision recall clip_score pick_score hps_v2_1 class_accuracy "
    "colour_accuracy heldout_class_accuracy heldout_colour_accuracy"
).split()
UNFINISHED = (".tmp", ".old", ".rows")  # endings of folders that are being written, replaced, or not scored yet
# Sections that say how results are made and shown, and where files go, not what is trained.
NOT_TRAINING = ("about", "run", "seed", "report", "evaluate", "export", "path", "pipeline", "generator_start")


class ProtocolId(NamedTuple):
    """Under which rules scores were computed. Only scores of equal protocols may be compared. Both fields are None in
    evaluations of earlier versions."""

    name: str | None = None
    hash: str | None = None

    @classmethod
    def of(cls, scores: dict) -> "ProtocolId":
        parts = (scores.get(key) for key in ("protocol", "protocol_hash"))
        return cls(*(None if part is None else str(part) for part in parts))

    def __str__(self) -> str:
        return one_line(" ".join(str(part) for part in self if part is not None)) or "unknown protocol"


@dataclass(frozen=True)
class Cost:
    """What training took. compute: forward passes of the denoiser on one batch; None if it is not known. seconds: of
    training. gpu_hours: device-hours; None if they are not known."""

    compute: float | None = 0.0
    seconds: float = 0.0
    gpu_hours: float | None = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        def total(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        hours = total(self.gpu_hours, other.gpu_hours)
        return Cost(total(self.compute, other.compute), self.seconds + other.seconds, hours)


def one_line(text: str) -> str:
    """Text for a terminal: white space collapsed, and characters that would act on the terminal, turn the direction of
    writing or cannot be encoded replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


class Results:
    """The results in a run folder. Only config.yaml is required; all else may be missing. Files are read once.

    evaluations: name of the folder with the evaluations; by default config.yaml's `evaluate.folder`. unit: the batch size
    that compute is counted in; by default the run's own `backtrack.batch`. Raises UserError.
    """

    def __init__(self, folder: Path, evaluations: str | None = None, unit: int | None = None):
        self.folder = folder
        file = folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"{folder}: has no config.yaml: it is not a run folder, or nothing has run in it yet")
        self.config = yaml.safe_load(file.read_text())
        self.evaluations = folder / (evaluations or (self.config.get("evaluate") or {}).get("folder") or "eval")
        self.unit = unit or self.config["backtrack"]["batch"]
        self._lines: dict[str, list[dict]] = {}
        self._scores: dict[str, dict | None] = {}
        self._owners: dict[Path, Results] = {folder: self}

    @property
    def kind(self) -> str:
        """How it uses the path: "path", "warm" or "none"."""
        return LABELS[self.config["backtrack"]["path"]]

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @cached_property
    def recipe(self) -> tuple:
        """What was trained: equal for runs that differ only in `seed` and in folders that follow from their run folder."""
        places = {"path": "path", "pipeline": "pipeline", "generator_start": ""}
        return self._base, *(self._place(self.config.get(key) or default) for key, default in places.items())

    @cached_property
    def _base(self) -> str:
        config = {key: value for key, value in self.config.items() if key not in NOT_TRAINING}
        config["sample"] = {key: value for key, value in config.get("sample", {}).items() if key != "out"}
        text = json.dumps(config, sort_keys=True)
        for root in self._roots:
            text = text.replace(json.dumps(f"{root}/")[1:-1], "RUN/")
        return text

    @property
    def _roots(self) -> tuple[str, str]:
        """Names of the run folder: that of its configuration, and that by which it was found."""
        return str(Path(self.config.get("run") or self.folder)), str(self.folder)

    def _place(self, value: str) -> tuple[str, str]:
        """A folder as (what the run that it belongs to trained, its name there); ("", value) if it belongs to no run."""
        path = Path(value)
        if value in ("path", "pipeline"):
            return self._base, value
        for root in self._roots:
            if path.is_relative_to(root):
                return self._base, str(path.relative_to(root))
        for parent in list(path.parents)[:3]:
            if parent.name and (parent / "config.yaml").is_file():
                return self._owner(parent)._base, str(path.relative_to(parent))
        return "", value

    def _owner(self, folder: Path) -> "Results":
        if folder not in self._owners:
            self._owners[folder] = Results(folder)
        return self._owners[folder]

    def lines(self, stage: str) -> list[dict]:
        """The metrics lines of a stage, oldest first."""
        if stage not in self._lines:
            file = self.folder / stage / "metrics.jsonl"
            text = file.read_text() if file.exists() else ""
            self._lines[stage] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return self._lines[stage]

    def curve(self, stage: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it is not null."""
        points = [(line["step"], line[key]) for line in self.lines(stage) if line.get(key) is not None]
        return [p[0] for p in points], [p[1] for p in points]

    def evaluation(self, what: str) -> dict | None:
        """The metrics of an evaluation, such as that of "generator"; None if there is none. Raises UserError."""
        if what not in self._scores:
            file = self.evaluations / what / "metrics.json"
            try:
                self._scores[what] = json.loads(file.read_text()) if file.exists() else None
            except json.JSONDecodeError as error:
                raise UserError(f"{file}: not JSON ({error}): evaluate {what} again") from error
        return self._scores[what]

    def evaluated(self) -> list[str]:
        """Names of what was evaluated, in order."""
        files = self.evaluations.glob("*/metrics.json")
        return sorted(file.parent.name for file in files if not file.parent.name.endswith(UNFINISHED))

    def how(self, what: str) -> dict:
        """The settings of an evaluation; empty if they were not written."""
        file = self.evaluations / what / "settings.yaml"
        return (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}

    def prompt_images(self, what: str) -> tuple[Path, dict] | None:
        """The row of images that an evaluation made of `sample.prompts`, and the settings that say how; None if there
        is none."""
        file, settings = self.evaluations / what / "prompts.png", self.how(what)
        return (file, settings) if file.exists() and settings.get("prompts") else None

    def scores_over_steps(self, protocol: ProtocolId, raw: bool = False) -> dict[int, dict]:
        """Metrics of the checkpoints that were evaluated under a protocol, by step. raw: of their raw weights, not of
        the averaged ones."""
        folders = by_step(self.evaluations, "-raw" if raw else "").items()
        found = {step: scores for step, folder in folders if (scores := self.evaluation(folder.name))}
        return {step: scores for step, scores in found.items() if ProtocolId.of(scores) == protocol}

    def cost(self, stage: str, step: int | None = None) -> Cost:
        """Cost of a stage, up to a step, of this run or of the run that its pipeline or path comes from."""
        roots = {
            "record": self.config["path"],
            "pretrain": self.config["pipeline"],
            "autoencoder": self.config["pipeline"],
        }
        folder = Path(roots[stage]).parent if roots.get(stage) else self.folder
        if not (folder / "config.yaml").exists():
            return Cost(None, 0.0, None)
        owner = self._owner(folder)
        lines = [line for line in owner.lines(stage) if step is None or line["step"] <= step]
        last = lines[-1] if lines else {}
        compute, hours = last.get("compute"), last.get("gpu_hours")
        if compute is not None:  # its unit is a batch of the run that trained
            compute *= owner.config["backtrack"]["batch"] / self.unit
        if hours is None and last.get("time") is not None:  # earlier versions
            hours = last["time"] * (owner.config.get("about") or {}).get("world_size", 1) / 3600
        return Cost(compute, last.get("time") or 0.0, hours)

    def generator_cost(self, step: int | None = None) -> Cost:
        """Cost of the generator up to a step of backtracking, with the recording if it uses the path."""
        cost = self.cost("backtrack", step)
        return cost + self.cost("record") if self.kind != "none" else cost

    def teacher_cost(self) -> Cost:
        """Cost of pretraining. Compute is that of denoisers only, without the autoencoder's."""
        autoencoder = self.cost("autoencoder")
        return self.cost("pretrain") + Cost(0.0, autoencoder.seconds, autoencoder.gpu_hours or 0.0)

    def grids(self, stage: str) -> list[tuple[int, Path]]:
        """Steps and files of a stage's sample grids."""
        return list(by_step(self.folder / stage / "samples", ".png").items())

    def nodes(self) -> list[dict]:
        """The path's nodes as in path.json, each with `images`: the file with its row of images, or None."""
        path = Path(self.config["path"] or self.folder / "path")
        if not (path / "path.json").exists():
            return []
        folders = [self.evaluations]
        if (path.parent / "config.yaml").exists():
            folders.append(self._owner(path.parent).evaluations)
        nodes = json.loads((path / "path.json").read_text())["nodes"]
        for node in nodes:
            files = [folder / "nodes" / f"node-{node['index']:04d}.png" for folder in folders]
            node["images"] = next((file for file in files if file.exists()), None)
        return nodes

    @property
    def student_steps(self) -> int:
        """Sampling steps of the generator."""
        return len(self.config["backtrack"].get("student_timesteps", [])) or 1

    @property
    def last_step(self) -> int:
        """Of the generator's training; 0 before its first metrics line."""
        lines = self.lines("backtrack")
        return lines[-1]["step"] if lines else 0

    def generator_scores(self, step: int | None = None) -> tuple[int, str, dict] | None:
        """(step, name, metrics) of the generator, or before it is evaluated of the last checkpoint that was; with a
        step, of that checkpoint. None if there is none."""
        if step is None and (scores := self.evaluation("generator")):
            return self.last_step, "generator", scores
        for known in reversed(by_step(self.evaluations)) if step is None else [step]:
            if scores := self.evaluation(step_name(known)):
                return known, step_name(known), scores
        return None
