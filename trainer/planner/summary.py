"""The plan of a run as one JSON-ready object; bytes are in GB of 1e9 bytes.

Nothing is guessed that can be measured: the networks run on the meta device, without memory, GPU or network access.
"""

from dataclasses import dataclass
from pathlib import Path

from models.architecture import Architecture, find_architecture
from models.diffusion import Schedule
from models.lora import check_target_names
from models.profile import layer_names
from models.validate import check_configs, check_sizes
from trainer.config.schema import RunSettings
from trainer.errors import UserError
from trainer.planner.flops import PEAK_TFLOPS, training_passes
from trainer.planner.images import reads
from trainer.planner.search import smallest_change, teacher_advice, zero3_note
from trainer.planner.stages import PLANS, network_flops, role_network

KINDS = ("parameters", "gradients", "optimizer", "ema", "buckets", "gathered")


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind. mfu: the share of their peak that training reaches. host_memory_gb: per node; 0 if
    unknown. bandwidth_gb: that a GPU sends to the others per second."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "A100"
    gpu_memory_gb: float = 80.0
    host_memory_gb: float = 0.0
    mfu: float = 0.35
    bandwidth_gb: float = 25.0

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def speed(self) -> float:
        """bf16 FLOP/s that training reaches on one GPU."""
        return PEAK_TFLOPS[self.gpu] * 1e12 * self.mfu


def make_plan(settings: RunSettings, cluster: Cluster) -> dict:
    """The whole plan. Raises UserError, ModelError."""
    if cluster.gpu not in PEAK_TFLOPS:
        raise UserError(f"--gpu {cluster.gpu}: unknown; use one of {', '.join(PEAK_TFLOPS)}")
    pipeline = settings.pipeline or str(settings.folder / "pipeline")
    if (Path(pipeline) / "model_index.json").is_file():
        check_configs(Path(pipeline))
    architecture = find_architecture(pipeline)
    _check(settings, architecture)
    stages = {stage: _stage(settings, architecture, cluster, stage) for stage in PLANS}
    return {
        "pipeline": pipeline,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "gpu": cluster.gpu,
        "gpu_memory_gb": cluster.gpu_memory_gb,
        "mfu": cluster.mfu,
        "bandwidth_gb": cluster.bandwidth_gb,
        **_networks(settings, architecture),
        "stages": stages,
        "teacher": teacher_advice(settings, architecture, cluster.ranks, cluster.gpu_memory_gb * 1e9),
        "fits": all(stage["fits"] for stage in stages.values()),
    }


def _check(settings: RunSettings, architecture: Architecture) -> None:
    """Refuses a pipeline that does not fit the settings, as training would. Raises ModelError."""
    schedule = Schedule.from_config(architecture.scheduler)
    about = architecture.denoiser, architecture.vae, schedule, settings.data.resolution, settings.student_timesteps
    check_sizes(architecture.family, *about, architecture.name, settings.data.selection.buckets)
    if settings.lora.rank:
        check_target_names(layer_names(architecture.denoiser), settings.lora, architecture.name)


def _networks(settings: RunSettings, architecture: Architecture) -> dict:
    """Parameters, costs of one sample and the size of the path."""
    frozen, trained = (role_network(settings, architecture, trained) for trained in (False, True))
    cost = network_flops(settings, architecture)
    trained_role = {"trainable": sum(trained.trainable), "frozen": sum(trained.frozen)}
    node = trained_role["trainable"] if settings.lora.rank else trained.parameters
    return {
        "parameters": {
            "teacher": {"trainable": 0, "frozen": frozen.parameters},
            "generator": trained_role,
            "fake_score": trained_role,
            "text_encoders": architecture.text_parameters,
            "vae": architecture.vae_parameters,
        },
        "per_sample": {
            "saved_gb": trained.saved / 1e9,
            "forward_backward_peak_gb": trained.peak / 1e9,
            "forward_peak_gb": frozen.forward_peak / 1e9,
            "forward_tflop": cost.forward / 1e12,
            "train_tflop": training_passes(settings, cost, settings.network.checkpointing) * cost.forward / 1e12,
        },
        "path": {
            "nodes": settings.record.nodes,
            "node_gb": 2 * node / 1e9,
            "gb": settings.record.nodes * 2 * node / 1e9,
        },
    }


def _stage(settings: RunSettings, architecture: Architecture, cluster: Cluster, stage: str) -> dict:
    plan = PLANS[stage](settings, architecture, cluster.ranks)
    limit, (moment, peak) = cluster.gpu_memory_gb * 1e9, plan.peak
    host = plan.host * cluster.gpus_per_node / 1e9
    seconds = plan.seconds(cluster.speed)
    out = {
        "micro_batch": plan.micro,
        "reads": reads(settings, stage),
        "roles": {
            name: {kind: getattr(role, kind) / 1e9 for kind in (*KINDS, "state", "host")} | {"zero": role.zero.stage}
            for name, role in plan.roles.items()
        },
        "fixed": _gb(plan.fixed),
        "activations": _gb(plan.activations),
        "moments": _gb(plan.moments),
        "peak_moment": moment,
        "peak_gb": peak / 1e9,
        "fits": peak <= limit,
        "host_gb_per_rank": plan.host / 1e9,
        "host_gb_per_node": host,
        "host_fits": cluster.host_memory_gb == 0 or host <= cluster.host_memory_gb,
        "checkpoint_gb": plan.checkpoint / 1e9,
        "network_gb_per_step": plan.traffic / 1e9,
        "network_seconds": plan.traffic / 1e9 / cluster.bandwidth_gb,
        "tflop_per_step": (plan.flops + plan.image_flops) / 1e12,
        "image_tflop_per_step": plan.image_flops / 1e12,
        "step_seconds": seconds,
        "steps": plan.options.steps,
        "days": seconds * plan.options.steps / 86400,
        "zero3": zero3_note(plan, cluster.speed) if peak > limit or plan.uses_zero3 else None,
    }
    if peak <= limit:
        return out | {"change": None}
    found = smallest_change(settings, architecture, cluster.ranks, stage, limit, cluster.speed)
    if found is None:
        return out | {"change": [], "change_peak_gb": None}
    overrides, better = found
    return out | {"change": [f"{k}={_yaml(v)}" for k, v in overrides.items()], "change_peak_gb": better.peak[1] / 1e9}


def _gb(sizes: dict[str, float]) -> dict[str, float]:
    return {name: size / 1e9 for name, size in sizes.items()}


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
