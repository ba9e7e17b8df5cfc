"""`disback status`: where a run stands, from its files alone.

For login nodes: it imports no torch and takes no lock, and works while the run trains.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import yaml

from trainer.checkpoint.directory import CheckpointDirectory
from trainer.config.load import read_values
from trainer.errors import UserError
from trainer.evaluation.results import SCORES, UNFINISHED, ProtocolId, one_line
from trainer.training.progress import FILE, Progress

STAGES = ("autoencoder", "pretrain", "record", "backtrack")
QUIET_SECONDS = 600.0  # a run that writes nothing for longer than this, and than five log lines take, has stalled
STARTING_SECONDS = 1800.0  # the same before the first metrics line: loading weights and compiling write nothing
RESTART_SECONDS = 2.0  # a log that is this much newer than status.json comes from a new start that is still loading
TAIL_BYTES = 65536
SHOWN_STEPS = 3  # of the evaluated checkpoints, the last ones


def _last_metrics(folder: Path) -> dict:
    """The last line of metrics.jsonl that has a speed (a target switch has none). The file may be growing."""
    try:
        with (folder / "metrics.jsonl").open("rb") as stream:
            stream.seek(max(stream.seek(0, 2) - TAIL_BYTES, 0))
            lines = stream.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("step_seconds"):
            return record
    return {}


def _age(*files: Path) -> float | None:
    """Seconds since the last write to any of the files."""
    times = [file.stat().st_mtime for file in files if file.exists()]
    return max(time.time() - max(times), 0.0) if times else None


def _settings(run: Path) -> dict:
    try:
        return yaml.safe_load((run / "config.yaml").read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _finished(run: Path, name: str, settings: dict, step: int, steps: int | None) -> bool:
    if name == "record":
        return (Path(settings.get("path") or run / "path") / "path.json").exists()
    if name == "backtrack":
        return step == steps and (run / "generator" / "model_index.json").exists()
    return step == steps


def _progress(folder: Path, section: dict) -> dict:
    """The stage's status.json; before training starts, and in runs of earlier versions, what metrics.jsonl tells."""
    if progress := Progress.read(folder):
        return progress
    metrics, log_every = _last_metrics(folder), section.get("loop", {}).get("log_every", 10)
    unknown = {"state": "running", "message": "", "restarts": 0, "warnings": [], "warning_count": 0}
    return {"step": 0} | metrics | {"steps": section.get("steps"), "log_every": log_every} | unknown


def stage_status(run: Path, name: str, settings: dict) -> dict:
    """One training stage: step, speed, last checkpoint, and whether it runs."""
    folder = run / name
    section = settings.get("pretrain", {}).get("autoencoder", {}) if name == "autoencoder" else settings.get(name, {})
    progress, checkpoints = _progress(folder, section), CheckpointDirectory(folder)
    step, steps = max(progress["step"], checkpoints.latest_step() or 0), progress["steps"]
    pace = progress.get("step_seconds")
    silent = _age(folder / FILE, folder / "log.txt", folder / "metrics.jsonl", checkpoints.latest_file)
    patience = max(QUIET_SECONDS, 5 * pace * progress["log_every"]) if pace else STARTING_SECONDS
    written, logged = _age(folder / FILE), _age(folder / "log.txt")
    restarting = written is not None and logged is not None and logged < written - RESTART_SECONDS
    if _finished(run, name, settings, step, steps):
        state = "finished"
    elif progress["state"] in ("stopped", "failed") and not restarting:
        state = progress["state"]
    else:
        state = "stalled" if silent is not None and silent > patience else "running"
    return {
        "stage": name,
        "state": state,
        "step": step,
        "steps": steps,
        "percent": 100.0 if state == "finished" else round(100 * step / steps, 1) if steps else None,
        "eta_seconds": round(pace * (steps - step)) if pace and steps and state != "finished" else None,
        "images_per_second": progress.get("images_per_second"),
        "target_node": progress.get("target_node"),
        "images_seen": progress.get("images_seen"),
        "epoch": progress.get("epoch"),
        "checkpoint": checkpoints.latest() or None,
        "checkpoint_age_seconds": _age(checkpoints.latest_file),
        "silent_seconds": silent,
        "restarts": progress["restarts"],
        "warnings": progress["warnings"],
        "warning_count": progress["warning_count"],
        "message": progress["message"] if state in ("stopped", "failed") else "",
    }


def _evaluations(run: Path, settings: dict) -> list[dict]:
    """What was evaluated, one entry per protocol: its name and hash (None in evaluations of earlier versions), the metric
    that it is judged by, and that metric's values. All folders of evaluations count: a protocol has one of its own."""
    own = (settings.get("evaluate") or {}).get("folder") or "eval"
    found: dict[ProtocolId, dict[str, dict]] = {}
    for file in sorted(run.glob("*/*/metrics.json"), key=lambda file: (file.parent.parent.name != own, file)):
        if file.parent.name.endswith(UNFINISHED):
            continue
        try:
            scores = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if not isinstance(scores, dict) or not scores.keys() & set(SCORES):
            continue
        names, name = found.setdefault(ProtocolId.of(scores), {}), file.parent.name
        names[f"{file.parent.parent.name}/{name}" if name in names else name] = scores
    entries = []
    for protocol, by_name in found.items():
        known = (key for key in SCORES if any(scores.get(key) is not None for scores in by_name.values()))
        metric = next(known, SCORES[0])
        values = {name: scores.get(metric) for name, scores in by_name.items()}
        about = {"protocol": protocol.name, "protocol_hash": protocol.hash}
        entries.append({**about, "metric": metric, "values": values})
    return entries


def _evaluation_line(entry: dict) -> str:
    """The values under one protocol; of the checkpoints only the last ones."""
    values = {name: value for name, value in entry["values"].items() if value is not None}
    steps = [name for name in values if name.startswith("step-")]
    shown = [name for name in values if name not in steps[:-SHOWN_STEPS]]
    text = ", ".join(f"{one_line(name)} {values[name]:.4g}" for name in shown) or "not computed"
    metric = "FID" if entry["metric"] == "fid" else entry["metric"]
    protocol = ProtocolId(entry["protocol"], entry["protocol_hash"])
    return f"  {metric} ({protocol})  {text} ({len(entry['values'])} evaluations)"


def run_status(run: Path) -> dict:
    """The whole run: the stage that wrote last, all stages, and the evaluations by protocol. Raises UserError."""
    stages = [name for name in STAGES if (run / name / "log.txt").exists()]
    if not stages:
        raise UserError(
            f"{run}: no stage has written here: name a run's folder, such as runs/sdxl, or --config FILE.yaml"
        )
    settings = _settings(run)
    found = {name: stage_status(run, name, settings) for name in stages}
    current = min(stages, key=lambda name: _age(run / name / "log.txt"))
    return {"run": str(run), **found[current], "stages": found, "evaluations": _evaluations(run, settings)}


def progress(run: Path, verb: str) -> str:
    """One line that changes when a verb makes progress: job scripts compare it before and after a restart."""
    if verb == "evaluate":
        done = sum(len(entry["values"]) for entry in _evaluations(run, _settings(run)))
        chunks = sum(1 for _ in run.glob("*/*.rows/rows-*.safetensors")) + sum(
            1 for _ in run.glob("*/references/*/rows-*.safetensors")
        )
        return f"{done} evaluations{f', {chunks} chunks of images' if chunks else ''}"
    names = ("autoencoder", "pretrain") if verb == "pretrain" else (verb,)
    words = [f"{name} {latest}" for name in names if (latest := CheckpointDirectory(run / name).latest())]
    return ", ".join(words) or "no checkpoint"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {secs:02d} s"


def page(status: dict) -> str:
    """The status as text: one line per stage, with its last warnings, and the evaluations."""
    lines = [status["run"]]
    for s in status["stages"].values():
        parts = [f"{s['stage']:11} {s['state']:8} {s['step']}/{s['steps'] or '?'}"]
        parts += [f"{s['percent']:.0f}%"] if s["percent"] is not None else []
        parts += [f"ETA {_span(s['eta_seconds'])}"] if s["state"] == "running" and s["eta_seconds"] is not None else []
        parts += [f"{s['images_per_second']:.1f} images/s"] if s["images_per_second"] else []
        parts += [f"epoch {s['epoch']:.2f}"] if s["epoch"] is not None else []
        parts += [f"target node {s['target_node']}"] if s["target_node"] is not None else []
        age = _span(s["checkpoint_age_seconds"])
        parts.append(f"checkpoint {s['checkpoint']}, {age} old" if s["checkpoint"] else "no checkpoint yet")
        parts += [f"{s['restarts']} restarts"] if s["restarts"] else []
        parts += [f"{s['warning_count']} warnings"] if s["warning_count"] else []
        if s["state"] == "stalled":
            parts.append(f"nothing written for {_span(s['silent_seconds'])}: look at the job's log, or run it again")
        if s["state"] == "stopped":
            parts.append("stopped after saving: the same command resumes it")
        if s["state"] == "failed":
            parts.append(s["message"] or "look at the job's log")
        lines.append("  " + "  ".join(parts))
        lines += [f"    warning: {text}" for text in s["warnings"][-3:]]
    lines += [_evaluation_line(entry) for entry in status["evaluations"]]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):  # trainer.entry's would bring the whole trainer along
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="disback status", description="Where a run stands, from its files alone.")
    parser.add_argument("run", nargs="?", help="run folder, such as runs/sdxl")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="configuration of the run, instead of its folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--progress", metavar="VERB", help="for job scripts: run folder, a tab, last checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    try:
        args = parser.parse_intermixed_args(argv)
        words = [word for word in (args.run, *args.overrides) if word]
        if args.config:
            run = Path(str(read_values(args.config, [w for w in words if not w.startswith("--")]).get("run") or "."))
        elif len(words) == 1 and not re.search("^[a-z_.]+=", words[0]):
            run = Path(words[0])
        else:
            raise UserError("name one run folder, or --config FILE.yaml (see disback status --help)")
        if args.progress:
            print(f"{run}\t{progress(run, args.progress)}")
            return 0
        status = run_status(run)
        print(json.dumps(status, indent=2) if args.json else page(status))
        return 0
    except (UserError, OSError) as error:
        print(f"disback: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
