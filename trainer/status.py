"""`disback status`: where a run stands, from its files alone.

For login nodes: torch is not imported, nothing is locked, and a run may be looked at while it trains.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import yaml

from trainer.config.load import read_values
from trainer.errors import UserError

STAGES = ("autoencoder", "pretrain", "record", "backtrack")
QUIET_SECONDS = 600.0  # without a word for longer than this, and than five lines should take, a run has stalled
STARTING_SECONDS = 1800.0  # loading weights and the first compilation say nothing
TAIL_BYTES = 65536


def _tail(file: Path) -> list[str]:
    """The last whole lines of a file that may be written to at this moment."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(stream.seek(0, 2) - TAIL_BYTES, 0))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.split("\n")[:-1] if line]


def _last_metrics(folder: Path) -> dict:
    for line in reversed(_tail(folder / "metrics.jsonl")):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("step_seconds"):  # not a target switch, which has no speed
            return record
    return {}


def _latest(folder: Path) -> str | None:
    try:
        return (folder / "LATEST").read_text().strip() or None
    except OSError:
        return None


def _age(*files: Path) -> float | None:
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


def stage_status(run: Path, name: str, settings: dict) -> dict:
    """One training stage: how far, how fast, since when silent."""
    folder = run / name
    section = settings.get("pretrain", {}).get("autoencoder", {}) if name == "autoencoder" else settings.get(name, {})
    steps, last, latest = section.get("steps"), _last_metrics(folder), _latest(folder)
    saved = int(latest[5:]) if latest and latest[5:].isdigit() else 0
    step = max(last.get("step", 0), saved)
    lines = (folder / "log.txt").read_text(errors="replace").splitlines() if (folder / "log.txt").exists() else []
    silent = _age(folder / "log.txt", folder / "metrics.jsonl", folder / "LATEST")
    pace = last.get("step_seconds")
    patience = STARTING_SECONDS
    if pace:
        patience = max(QUIET_SECONDS, 5 * pace * section.get("loop", {}).get("log_every", 10))
    if _finished(run, name, settings, step, steps):
        state = "finished"
    elif lines and "stopped by a signal" in lines[-1]:
        state = "stopped"
    else:
        state = "stalled" if silent is not None and silent > patience else "running"
    warnings = [line.partition(" WARNING ")[2] for line in lines if " WARNING " in line]
    return {
        "stage": name,
        "state": state,
        "step": step,
        "steps": steps,
        "percent": round(100 * step / steps, 1) if steps else None,
        "eta_seconds": round(pace * (steps - step)) if pace and steps and state != "finished" else None,
        "images_per_second": last.get("images_per_second"),
        "target_node": last.get("target_node"),
        "checkpoint": latest,
        "checkpoint_age_seconds": _age(folder / "LATEST"),
        "silent_seconds": silent,
        "restarts": sum("resumed from" in line for line in lines),
        "warnings": warnings,
    }


def _evaluations(run: Path) -> dict[str, float | None]:
    scores = {}
    for file in sorted((run / "eval").glob("*/metrics.json")):
        try:
            scores[file.parent.name] = json.loads(file.read_text()).get("fid")
        except (OSError, json.JSONDecodeError):
            continue
    return scores


def run_status(run: Path) -> dict:
    """The whole run: the stage that wrote last, every stage, and the FID of what was evaluated. Raises UserError."""
    stages = {name: run / name for name in STAGES if (run / name / "log.txt").exists()}
    if not stages:
        raise UserError(
            f"{run}: no stage has written here: name a run's folder, such as runs/sdxl, or --config FILE.yaml"
        )
    settings = _settings(run)
    found = {name: stage_status(run, name, settings) for name in stages}
    current = max(stages, key=lambda name: (stages[name] / "log.txt").stat().st_mtime)
    return {"run": str(run), **found[current], "stages": found, "fid": _evaluations(run)}


def progress(run: Path, verb: str) -> str:
    """What changes when a verb gets on: the job scripts compare it before and after a restart."""
    if verb == "evaluate":
        return f"{len(_evaluations(run))} evaluations"
    names = ("autoencoder", "pretrain") if verb == "pretrain" else (verb,)
    words = [f"{name} {latest}" for name in names if (latest := _latest(run / name))]
    return ", ".join(words) or "no checkpoint"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {secs:02d} s"


def page(status: dict) -> str:
    """What a person reads: a line a stage, then the last warnings."""
    lines = [status["run"]]
    for s in status["stages"].values():
        parts = [f"{s['stage']:11} {s['state']:8} {s['step']}/{s['steps'] or '?'}"]
        parts += [f"{s['percent']:.0f}%"] if s["percent"] is not None else []
        parts += [f"ETA {_span(s['eta_seconds'])}"] if s["state"] == "running" and s["eta_seconds"] is not None else []
        parts += [f"{s['images_per_second']:.1f} images/s"] if s["images_per_second"] else []
        parts += [f"target node {s['target_node']}"] if s["target_node"] is not None else []
        age = _span(s["checkpoint_age_seconds"])
        parts.append(f"checkpoint {s['checkpoint']}, {age} old" if s["checkpoint"] else "no checkpoint yet")
        parts += [f"{s['restarts']} restarts"] if s["restarts"] else []
        parts += [f"{len(s['warnings'])} warnings"] if s["warnings"] else []
        if s["state"] == "stalled":
            parts.append(f"nothing written for {_span(s['silent_seconds'])}: look at the job's log, or run it again")
        if s["state"] == "stopped":
            parts.append("stopped after saving: the same command goes on")
        lines.append("  " + "  ".join(parts))
        lines += [f"    warning: {text}" for text in s["warnings"][-3:]]
    if status["fid"]:
        shown = ", ".join(f"{name} {fid:.2f}" for name, fid in status["fid"].items() if fid is not None)
        lines.append(f"  FID         {shown or 'not computed'} ({len(status['fid'])} evaluations)")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="disback status", description="Where a run stands, from its files alone.")
    parser.add_argument("run", nargs="?", help="a run's folder, such as runs/sdxl")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="the run of a configuration instead")
    parser.add_argument("--json", action="store_true", help="for programs: everything, as one JSON object")
    parser.add_argument(
        "--progress", metavar="VERB", help="for job scripts: the run's folder, a tab, the last checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    try:
        args = parser.parse_intermixed_args(argv)
        words = [word for word in (args.run, *args.overrides) if word]
        if args.config:
            run = Path(str(read_values(args.config, [w for w in words if not w.startswith("--")]).get("run") or "."))
        elif len(words) == 1 and not re.search("^[a-z_.]+=", words[0]):
            run = Path(words[0])
        else:
            raise UserError("name one run's folder, or --config FILE.yaml (see disback status --help)")
        if args.progress:
            print(f"{run}\t{progress(run, args.progress)}")
            return 0
        status = run_status(run)
        print(json.dumps(status, indent=2) if args.json else page(status))
        return 0
    except UserError as error:
        print(f"disback: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
