"""Time, TFLOP/s, MFU and memory of both stages' steps on one GPU: SDXL's own architecture with random weights.

    python -m benchmarks.sdxl_step [--attention auto,cudnn,flash,efficient,xformers,math] [--steps 20] [KEY=VALUE ...]
    python -m benchmarks.sdxl_step --small      # a miniature of the same topology, to try the script on a CPU

The pipeline is written into a temporary folder, nothing is fetched. Settings are those of configs/sdxl.yaml with one
sample per step and optimizer states in host memory (ONE_GPU): a full fine-tune has 87 GB of states, more than an 80 GB
GPU holds. Overrides come on top, such as lora.rank=64, network.checkpointing=false or
backtrack.generator_ds_config=zero2. Each row is measured in its own process: if it runs out of memory, the row has the
reason, and the next one starts with an empty device. Prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import trainer.distributed.logs  # noqa: F401  before the libraries
from benchmarks.pipeline import write_captions, write_sdxl
from benchmarks.stages import STAGES, TURN, UPDATE, measure
from models.architecture import Architecture, find_architecture
from models.attention import NAMES
from models.errors import ModelError
from trainer.config.load import load_settings
from trainer.config.schema import RunSettings
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import finish, start
from trainer.errors import UserError
from trainer.planner.stages import PLANS, RUNTIME

REPOSITORY = Path(__file__).resolve().parent.parent
ONE_GPU = (
    "record.batch=1", "record.probe=1", "record.nodes=1", "record.steps=1000000",
    "record.ds_config=zero2_offload", "backtrack.batch=1", "backtrack.path=none",
    "backtrack.generator_ds_config=zero2_offload", "backtrack.fake_score_ds_config=zero2_offload",
)  # fmt: skip
SMALL = ("data.resolution=64", "data.workers=0")
RESULT = "row.json"


def settings_of(root: Path, small: bool, overrides: list[str]) -> RunSettings:
    places = [f"run={root / 'run'}", f"pipeline={root / 'pipeline'}", f"data.train={root / 'shards'}"]
    fixed = [*places, *ONE_GPU, *(SMALL if small else ())]
    return load_settings(REPOSITORY / "configs" / "sdxl.yaml", [*fixed, *overrides])


def work(what: str, root: Path, args: argparse.Namespace) -> None:
    """In a child process: writes the pipeline, or measures one stage, and writes the result to RESULT."""
    no_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if what == "build":
        write_captions(root / "shards", 64)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        result = {"parameters": write_sdxl(root / "pipeline", args.small, device), "device": name}
    else:
        world = start()
        if world.size > 1:
            raise SystemExit("sdxl_step measures one GPU: run it without a launcher")
        result = measure(what, settings_of(root, args.small, args.overrides), args.steps, world)
        finish()
    (root / RESULT).write_text(json.dumps(result))


def child(what: str, root: Path, args: argparse.Namespace, *overrides: str) -> dict:
    """Runs `work` in its own process; returns a row with the reason if that process fails."""
    (root / RESULT).unlink(missing_ok=True)
    call = [sys.executable, "-m", "benchmarks.sdxl_step", "--child", what, "--root", str(root)]
    call += ["--steps", str(args.steps), *(["--small"] if args.small else []), *args.overrides, *overrides]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # Only the table goes to stdout, not what DeepSpeed prints.
    code = subprocess.run(call, cwd=REPOSITORY, env=env, stdout=sys.stderr).returncode
    if (root / RESULT).exists():
        return json.loads((root / RESULT).read_text())
    hint = " (killed: host memory?)" if code == -9 else ""
    return {"reason": f"its process exited with code {code}{hint}, see above"}


def planned(name: str, settings: RunSettings, architecture: Architecture) -> dict[str, float]:
    """The peaks that `disback plan` expects, in GB, without the part assumed for CUDA, which the allocator does not see."""
    moments = PLANS[name](settings, architecture, 1).moments
    kinds = {TURN: ("generator",), UPDATE: ("sampling", "fake-score")}
    found = {kind: [v for moment, v in moments.items() if moment.startswith(starts)] for kind, starts in kinds.items()}
    return {kind: (max(values) - RUNTIME) / 1e9 for kind, values in found.items() if values}


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else f"{value:{form}}"


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; a dash for what a stage does not have."""
    lines = [
        "| stage | attention | step s | generator turn s | fake update s | TFLOP/s: step | turn | update | MFU "
        "| peak GB (plan): turn | update |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        begin = f"| {row['stage']} | {row['attention']}"
        plan = {kind: f"({_number(row['plan'].get(kind), '.2f')})" for kind in (TURN, UPDATE)}
        if "reason" in row:
            empty = " | ".join("-" * 7)
            lines.append(f"{begin}: {row['reason'].replace('|', '/')} | {empty} | {plan[TURN]} | {plan[UPDATE]} |")
            continue
        turn, update = (row[kind] or dict.fromkeys(("seconds", "peak_gb", "tflops")) for kind in (TURN, UPDATE))
        chosen = "" if row["kernel"] == row["attention"] else f" = {row['kernel']}"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells = [_number(row["step_seconds"]), _number(turn["seconds"]), _number(update["seconds"])]
        cells += [_number(v) for v in (row["step_tflops"], turn["tflops"], update["tflops"])]
        cells += [mfu, *(f"{_number(v['peak_gb'], '.2f')} {plan[k]}" for k, v in ((TURN, turn), (UPDATE, update)))]
        lines.append(f"{begin}{chosen} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--attention", default="auto", help=f"kernels, with commas: auto, {', '.join(NAMES)}")
    parser.add_argument("--stages", default=",".join(STAGES), help="with commas")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per stage (whole cycles), after a warm-up")
    parser.add_argument("--small", action="store_true", help="a miniature, for a machine without a GPU")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder (SDXL's pipeline: 7 GB)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.child:
        work(args.child, args.root, args)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        try:
            settings_of(root, args.small, args.overrides)
            about = child("build", root, args)
            if "reason" in about:
                raise UserError(f"the pipeline was not written: {about['reason']}")
            rows = []
            for attention in args.attention.split(","):
                for stage in args.stages.split(","):
                    override = f"network.attention={attention}"
                    settings = settings_of(root, args.small, [*args.overrides, override])
                    plan = planned(stage, settings, find_architecture(settings.pipeline))
                    row = {"stage": stage, "attention": attention, "plan": plan}
                    rows.append(row | child(stage, root, args, override))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        except (UserError, ModelError) as error:
            print(error, file=sys.stderr)
            return 2
    print(
        f"{about['device']}, UNet of {about['parameters'] / 1e6:.1f} M parameters{''.join(f', {o}' for o in args.overrides)}\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
