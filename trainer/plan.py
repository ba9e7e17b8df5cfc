"""`disback plan`: memory, disk, work and time of a run on given machines, before any weight is loaded.

Nothing is guessed that can be measured: networks run on the meta device (no memory, no GPU, no network access).
"""

import json
import sys
from pathlib import Path

from models.architecture import Architecture, find_architecture
from trainer.config.load import load_settings
from trainer.config.schema import RunSettings
from trainer.entry import Parser, guarded
from trainer.errors import UserError
from trainer.planner.search import smallest_change, teacher_advice
from trainer.planner.stages import PLANS, StagePlan, network_cost
from trainer.training.metrics import PEAK_TFLOPS

KINDS = ("parameters", "gradients", "optimizer", "ema", "buckets", "gathered")


def make_plan(
    settings: RunSettings, nodes: int, gpus: int, memory_gb: float, mfu: float, gpu: str, host_gb: float
) -> dict:
    """The whole plan as one JSON-ready object. Bytes are in GB of 1e9 bytes. Raises UserError, ModelError."""
    if gpu not in PEAK_TFLOPS:
        raise UserError(f"--gpu {gpu}: not known: one of {', '.join(PEAK_TFLOPS)}")
    pipeline = settings.pipeline or str(settings.folder / "pipeline")
    architecture = find_architecture(pipeline)
    ranks, limit = nodes * gpus, memory_gb * 1e9
    frozen, net = (network_cost(settings, architecture, trained) for trained in (False, True))
    trainable = sum(net.trainable)
    node = trainable if settings.lora.rank else net.parameters
    out = {
        "pipeline": pipeline,
        "nodes": nodes,
        "gpus_per_node": gpus,
        "gpu": gpu,
        "gpu_memory_gb": memory_gb,
        "mfu": mfu,
        "parameters": {
            "teacher": {"trainable": 0, "frozen": frozen.parameters},
            "generator": {"trainable": trainable, "frozen": sum(net.frozen)},
            "fake_score": {"trainable": trainable, "frozen": sum(net.frozen)},
            "text_encoders": architecture.text_parameters,
            "vae": architecture.vae_parameters,
        },
        "per_sample": {
            "saved_gb": net.saved / 1e9,
            "forward_backward_peak_gb": net.peak / 1e9,
            "forward_peak_gb": frozen.forward_peak / 1e9,
            "forward_tflop": frozen.forward_flops / 1e12,
            "train_tflop": net.train_flops / 1e12,
        },
        "path": {
            "nodes": settings.record.nodes,
            "node_gb": 2 * node / 1e9,
            "gb": settings.record.nodes * 2 * node / 1e9,
        },
        "stages": {},
    }
    for stage, build in PLANS.items():
        plan = build(settings, architecture, ranks)
        out["stages"][stage] = _stage(plan, limit, mfu, gpu, gpus, host_gb) | _help(
            settings, architecture, ranks, plan, limit
        )
    out["teacher"] = teacher_advice(settings, architecture, ranks, limit)
    out["fits"] = all(stage["fits"] for stage in out["stages"].values())
    return out


def _stage(plan: StagePlan, limit: float, mfu: float, gpu: str, gpus: int, host_gb: float) -> dict:
    moment, peak = plan.peak
    seconds = plan.flops / 1e12 / (PEAK_TFLOPS[gpu] * mfu)
    roles = {}
    for name, role in plan.roles.items():
        roles[name] = {kind: getattr(role, kind) / 1e9 for kind in KINDS} | {
            "state": role.state / 1e9,
            "zero": plan.zero[name],
            "host": role.host / 1e9,
        }
    return {
        "micro_batch": plan.micro,
        "roles": roles,
        "fixed": {k: v / 1e9 for k, v in plan.fixed.items()},
        "activations": {k: v / 1e9 for k, v in plan.activations.items()},
        "moments": {k: v / 1e9 for k, v in plan.moments.items()},
        "peak_moment": moment,
        "peak_gb": peak / 1e9,
        "fits": peak <= limit,
        "host_gb_per_rank": plan.host / 1e9,
        "host_gb_per_node": plan.host * gpus / 1e9,
        "host_fits": host_gb == 0 or plan.host * gpus / 1e9 <= host_gb,
        "checkpoint_gb": plan.checkpoint / 1e9,
        "network_gb_per_step": plan.traffic / 1e9,
        "tflop_per_step": plan.flops / 1e12,
        "step_seconds": seconds,
        "steps": plan.steps,
        "days": seconds * plan.steps / 86400,
    }


def _help(settings: RunSettings, architecture: Architecture, ranks: int, plan: StagePlan, limit: float) -> dict:
    if plan.peak[1] <= limit:
        return {"change": None}
    found = smallest_change(settings, architecture, ranks, plan.stage, limit)
    if found is None:
        return {"change": [], "change_peak_gb": None}
    overrides, better = found
    return {"change": [f"{k}={_yaml(v)}" for k, v in overrides.items()], "change_peak_gb": better.peak[1] / 1e9}


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(plan: dict) -> str:
    """The plan for people."""
    ranks = plan["nodes"] * plan["gpus_per_node"]
    lines = [
        f"{plan['pipeline']} on {plan['nodes']} x {plan['gpus_per_node']} = {ranks} {plan['gpu']} of "
        f"{plan['gpu_memory_gb']:g} GB (GB = 1e9 bytes)",
        "",
        f"{'parameters':16}{'trainable':>16}{'frozen':>16}",
    ]
    for name, count in plan["parameters"].items():
        pair = (count["trainable"], count["frozen"]) if isinstance(count, dict) else (0, count)
        lines.append(f"  {name:14}{pair[0]:>16,}{pair[1]:>16,}")
    one = plan["per_sample"]
    lines += [
        "",
        f"one sample: {one['forward_tflop']:.2f} TFLOP forward, {one['train_tflop']:.2f} forward and backward; "
        f"{one['saved_gb']:.1f} GB of activations kept, {one['forward_backward_peak_gb']:.1f} GB at most",
        f"path on disk: {plan['path']['nodes']} nodes x {plan['path']['node_gb']:.1f} GB = {plan['path']['gb']:.1f} GB",
    ]
    for name, stage in plan["stages"].items():
        lines += _stage_table(name, stage, plan)
    return "\n".join([*lines, "", f"teacher: {plan['teacher']}"])


def _stage_table(name: str, stage: dict, plan: dict) -> list[str]:
    head = "".join(f"{kind:>12}" for kind in (*KINDS, "host"))
    lines = ["", f"{name}: {stage['micro_batch']} samples a micro-batch; GB a GPU", f"  {'role':20}{'ZeRO':>5}{head}"]
    for role, parts in stage["roles"].items():
        row = "".join(f"{parts[kind]:>12.1f}" for kind in (*KINDS, "host"))
        lines.append(f"  {role:20}{parts['zero']:>5}{row}")
    fixed = ", ".join(f"{what} {gb:.1f}" for what, gb in stage["fixed"].items())
    lines += [f"  besides: {fixed}", f"  {'activations':34}{'GB':>8}"]
    lines += [f"    {what:32}{gb:>8.1f}" for what, gb in stage["activations"].items()]
    lines.append(f"  {'memory at each moment':34}{'GB':>8}")
    for what, gb in stage["moments"].items():
        mark = "  <- peak" if what == stage["peak_moment"] else ""
        lines.append(f"    {what:32}{gb:>8.1f}{mark}")
    verdict = "fits" if stage["fits"] else "DOES NOT FIT"
    lines.append(f"  {verdict}: {stage['peak_gb']:.1f} of {plan['gpu_memory_gb']:.1f} GB")
    if not stage["fits"]:
        if stage["change"]:
            lines.append(f"  smallest change that fits ({stage['change_peak_gb']:.1f} GB): {' '.join(stage['change'])}")
        else:
            lines.append("  no change of sharding, batch, offload or LoRA makes it fit: more or larger GPUs are needed")
    if not stage["host_fits"]:
        lines.append(f"  host memory DOES NOT FIT: {stage['host_gb_per_node']:.1f} GB a node are needed")
    lines += [
        f"  checkpoint {stage['checkpoint_gb']:.1f} GB; host memory {stage['host_gb_per_rank']:.1f} GB a rank; "
        f"network {stage['network_gb_per_step']:.2f} GB sent a step and GPU",
        f"  {stage['tflop_per_step']:.1f} TFLOP a step and GPU: {stage['step_seconds']:.2f} s at {plan['mfu']:.0%} of "
        f"{plan['gpu']}'s peak, {stage['days']:.1f} days for {stage['steps']} steps",
    ]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="disback plan", description="Memory, disk and time of a run, before any weight is loaded.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu", default="A100", help=f"for its peak speed: {', '.join(PEAK_TFLOPS)}")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB")
    parser.add_argument("--host-memory", type=float, default=0.0, metavar="GB", help="of a node; 0 does not check it")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the GPU's peak that is reached")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    argv = sys.argv[1:] if argv is None else argv

    def go() -> None:
        args = parser.parse_intermixed_args(argv)
        for flag in ("nodes", "gpus_per_node", "gpu_memory", "mfu"):
            if getattr(args, flag) <= 0:
                raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be greater than 0")
        settings = load_settings(args.config, args.overrides)
        machine = (args.nodes, args.gpus_per_node, args.gpu_memory, args.mfu, args.gpu, args.host_memory)
        plan = make_plan(settings, *machine)
        print(json.dumps(plan, indent=2) if args.json else table(plan))

    return guarded(go, "--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
