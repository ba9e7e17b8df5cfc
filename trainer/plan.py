"""`disback plan`: memory, disk, work and time of a run on given GPUs, before any weight is loaded."""

import json
import sys
from pathlib import Path

from trainer.config.load import load_settings
from trainer.entry import Parser, exit_with, guarded
from trainer.errors import UserError
from trainer.planner.flops import PEAK_TFLOPS

COLUMNS = ("parameters", "gradients", "optimizer", "ema", "buckets", "gathered", "host")


def table(plan: dict) -> str:
    """The plan as text; plan: see `trainer.planner.summary.make_plan`."""
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
    sample = plan["per_sample"]
    lines += [
        "",
        f"per sample: {sample['forward_tflop']:.2f} TFLOP forward, {sample['train_tflop']:.2f} forward and backward; "
        f"{sample['saved_gb']:.1f} GB of saved activations, {sample['forward_backward_peak_gb']:.1f} GB at the peak",
        f"path on disk: {plan['path']['nodes']} nodes x {plan['path']['node_gb']:.1f} GB = {plan['path']['gb']:.1f} GB",
    ]
    for name, stage in plan["stages"].items():
        lines += _stage_table(name, stage, plan)
    return "\n".join([*lines, "", f"teacher: {plan['teacher']}"])


def _stage_table(name: str, stage: dict, plan: dict) -> list[str]:
    head = "".join(f"{kind:>12}" for kind in COLUMNS)
    lines = [
        "",
        f"{name}: {stage['micro_batch']} samples per micro-batch; reads {stage['reads']}; GB per GPU",
        f"  {'role':20}{'ZeRO':>5}{head}",
    ]
    for role, sizes in stage["roles"].items():
        row = "".join(f"{sizes[kind]:>12.1f}" for kind in COLUMNS)
        lines.append(f"  {role:20}{sizes['zero']:>5}{row}")
    fixed = ", ".join(f"{what} {gb:.1f}" for what, gb in stage["fixed"].items())
    lines += [f"  besides: {fixed}", f"  {'activations':34}{'GB':>8}"]
    lines += [f"    {what:32}{gb:>8.1f}" for what, gb in stage["activations"].items()]
    lines.append(f"  {'memory at each moment':34}{'GB':>8}")
    for what, gb in stage["moments"].items():
        mark = "  <- peak" if what == stage["peak_moment"] else ""
        lines.append(f"    {what:32}{gb:>8.1f}{mark}")
    verdict = "fits" if stage["fits"] else "DOES NOT FIT"
    lines.append(f"  {verdict}: {stage['peak_gb']:.1f} of {plan['gpu_memory_gb']:.1f} GB")
    if stage["change"]:
        lines.append(f"  smallest change that fits ({stage['change_peak_gb']:.1f} GB): {' '.join(stage['change'])}")
    elif not stage["fits"]:
        lines.append("  no change of sharding, batch, offload or LoRA makes it fit: use more or larger GPUs")
    if not stage["host_fits"]:
        lines.append(f"  host memory DOES NOT FIT: {stage['host_gb_per_node']:.1f} GB per node are needed")
    lines += [
        f"  checkpoint {stage['checkpoint_gb']:.1f} GB; host memory {stage['host_gb_per_rank']:.1f} GB per rank; "
        f"network {stage['network_gb_per_step']:.2f} GB sent per step and GPU",
        f"  {stage['tflop_per_step']:.1f} TFLOP per step and GPU: {stage['step_seconds']:.2f} s at {plan['mfu']:.0%} of "
        f"the {plan['gpu']}'s peak, {stage['days']:.1f} days for {stage['steps']} steps; beside it "
        f"{stage['network_seconds']:.2f} s of network at {plan['bandwidth_gb']:g} GB/s",
    ]
    if stage["image_tflop_per_step"]:
        lines.append(
            f"  {stage['image_tflop_per_step']:.1f} of these TFLOP encode the GAN term's real images, in float32 at half the "
            "speed: encoded shards have them ready (`disback shards --encode`)"
        )
    if stage["zero3"]:
        lines.append(f"  {stage['zero3']}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="disback plan", description="Memory, disk and time of a run, before any weight is loaded.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu", default="A100", help=f"model, for its peak speed: {', '.join(PEAK_TFLOPS)}")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB")
    parser.add_argument("--host-memory", type=float, default=0.0, metavar="GB", help="per node; 0 skips the check")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the GPU's peak that training reaches")
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=25.0,
        metavar="GB/s",
        help="what a GPU sends to the others; default: a port of 200 Gb/s per GPU",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    argv = sys.argv[1:] if argv is None else argv

    def go() -> None:
        args = parser.parse_intermixed_args(argv)
        for flag in ("nodes", "gpus_per_node", "gpu_memory", "mfu", "bandwidth"):
            if getattr(args, flag) <= 0:
                raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be greater than 0")
        settings = load_settings(args.config, args.overrides)
        # Imports torch and diffusers, which `--help` and mistakes in the configuration need not wait for.
        from trainer.planner.summary import Cluster, make_plan

        machines = args.nodes, args.gpus_per_node, args.gpu, args.gpu_memory, args.host_memory, args.mfu, args.bandwidth
        plan = make_plan(settings, Cluster(*machines))
        print(json.dumps(plan, indent=2) if args.json else table(plan))

    return guarded(go, "--debug" in argv)


if __name__ == "__main__":
    exit_with(main)
