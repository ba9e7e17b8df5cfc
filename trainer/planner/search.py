"""The smallest change of a configuration that makes a stage fit a GPU."""

from collections.abc import Iterator
from itertools import product

from data.paths import RESOLVED
from models.architecture import Architecture
from trainer.config.schema import RunSettings
from trainer.errors import UserError
from trainer.planner.stages import PLANS, StagePlan

LORA_RANK = 64  # ours, the recipe's
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
ZERO3, ZERO3_SLOW = 3, 8  # costs of ZeRO-3: while the GPU's work hides its Python, and at smaller micro-batches
Change = tuple[
    int, dict[str, object]
]  # (how much it costs in speed or in what is learned, overrides); 0 changes nothing


def changed(settings: RunSettings, overrides: dict[str, object]) -> RunSettings:
    """The settings with dotted keys set, validated."""
    values = settings.model_dump()
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return RunSettings.model_validate(values, context=RESOLVED)


def _alternatives(settings: RunSettings, plan: StagePlan) -> list[list[Change]]:
    """For each aspect of the configuration that may change, no change and its other values."""
    stage, s = plan.name, plan.options
    keys = ["ds_config"] if stage == "record" else ["generator_ds_config", "fake_score_ds_config"]
    current = min(STAGES.get(getattr(s, key), 3) for key in keys)

    def engines(name: str) -> dict[str, object]:
        return {f"{stage}.{key}": name for key in keys}

    zero = [(n, engines(f"zero{n}")) for n in (1, 2, ZERO3) if n > current]
    zero += [(9, engines("zero2_offload")), (10, engines("zero3_offload"))]
    frozen = plan.roles["generator" if stage == "record" else "teacher"]
    sharded = [] if frozen.zero.stage == 3 else [(4, {f"{stage}.teacher_ds_config": "teacher"})]
    checkpointing = [] if settings.network.checkpointing else [(5, {"network.checkpointing": True})]
    pieces = [k for k in (2, 4, 8, 16, 32) if plan.micro % k == 0]
    accumulation = [(6, {f"{stage}.accumulation": s.accumulation * k}) for k in pieces]
    split = []
    if stage == "backtrack":
        split = [(7, {"backtrack.generator_split": k}) for k in pieces if k > s.generator_split]
    lora = [] if settings.lora.rank else [(11, {"lora.rank": LORA_RANK})]
    return [[(0, {}), *changes] for changes in (zero, sharded, checkpointing, accumulation, split, lora)]


def _candidates(settings: RunSettings, plan: StagePlan, speed: float) -> Iterator[dict[str, object]]:
    """Overrides from the smallest change to the largest: few aspects before many, then cheap ones before expensive ones."""
    accumulation = f"{plan.name}.accumulation"
    found = []
    for choice in product(*_alternatives(settings, plan)):
        costs = sorted((cost for cost, _ in choice if cost), reverse=True)
        if costs:
            overrides = {key: value for _, part in choice for key, value in part.items()}
            samples = plan.micro * plan.options.accumulation // overrides.get(accumulation, plan.options.accumulation)
            if ZERO3 in costs and slow_zero3(plan, speed, samples):
                costs = sorted((ZERO3_SLOW if cost == ZERO3 else cost for cost in costs), reverse=True)
            pieces = [v for k, v in overrides.items() if k.endswith(("accumulation", "generator_split"))]
            found.append(((len(costs), costs, pieces), overrides))
    yield from (overrides for _, overrides in sorted(found, key=lambda item: item[0]))


def slow_zero3(plan: StagePlan, speed: float, micro: int) -> bool:
    """Whether ZeRO-3's Python takes longer than the GPU's work on a micro-batch of `micro` samples at `speed` FLOP/s."""
    python, work = plan.zero3_seconds(speed, micro)
    return python > work


def zero3_note(plan: StagePlan, speed: float) -> str | None:
    """Why ZeRO-3 is not what to try first at this micro-batch; None if it is not slow."""
    python, work = plan.zero3_seconds(speed, plan.micro)
    if python <= work:
        return None
    enough = plan.micro * int(-(-python // work))
    return (
        f"ZeRO-3 is slow at {plan.micro} samples per micro-batch: its Python takes about {python:.2f} s of a forward and "
        f"backward pass, the GPU {work:.2f} s; about {enough} samples would hide it"
    )


def smallest_change(
    settings: RunSettings, architecture: Architecture, ranks: int, stage: str, limit: float, speed: float
) -> tuple[dict[str, object], StagePlan] | None:
    """The first overrides with which the stage's peak is at most `limit` bytes on GPUs that reach `speed` FLOP/s, and its
    plan; None if there are none."""
    build = PLANS[stage]
    for overrides in _candidates(settings, build(settings, architecture, ranks), speed):
        try:
            plan = build(changed(settings, overrides), architecture, ranks)
        except UserError:
            continue
        if plan.peak[1] <= limit:
            return overrides, plan
    return None


def teacher_advice(settings: RunSettings, architecture: Architecture, ranks: int, limit: float) -> str:
    """Whether to shard the teacher, and why."""
    if ranks == 1:
        return "whole: there is only one GPU"
    whole, sharded = (
        PLANS["backtrack"](changed(settings, {"backtrack.teacher_ds_config": name}), architecture, ranks)
        for name in ("zero0", "teacher")
    )
    freed, sent = (whole.peak[1] - sharded.peak[1]) / 1e9, (sharded.traffic - whole.traffic) / 1e9
    effect = f"sharding frees {freed:.1f} GB at the peak and sends {sent:.2f} GB more per step and GPU"
    if whole.peak[1] <= limit:
        return f"whole (backtrack.teacher_ds_config=zero0), since it fits; {effect}"
    if sharded.peak[1] <= limit:
        return f"sharded (backtrack.teacher_ds_config=teacher), since whole it does not fit; {effect}"
    return f"sharded (backtrack.teacher_ds_config=teacher), which alone is not enough; {effect}"
