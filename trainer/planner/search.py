"""The smallest change of a configuration with which a stage fits a GPU."""

from collections.abc import Callable, Iterator
from itertools import product

from models.architecture import Architecture
from trainer.config.schema import RunSettings
from trainer.errors import UserError
from trainer.planner.stages import PLANS, StagePlan

LORA_RANK = 64  # ours, the recipe's
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def changed(settings: RunSettings, overrides: dict[str, object]) -> RunSettings:
    """The settings with dotted keys set. They are validated."""
    values = settings.model_dump()
    for key, value in overrides.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return RunSettings.model_validate(values)


def _choices(settings: RunSettings, plan: StagePlan) -> list[list[tuple[int, dict]]]:
    """For each thing that may change, its values as (rank, overrides), the present one first as (0, {}). A lower rank is
    the smaller change: it costs less speed, or less of what is learned."""
    stage = plan.stage
    s = getattr(settings, stage)
    keys = ["ds_config"] if stage == "record" else ["generator_ds_config", "fake_score_ds_config"]
    now = min(STAGES.get(getattr(s, key), 3) for key in keys)
    none: tuple[int, dict] = (0, {})

    def engines(name: str) -> dict:
        return {f"{stage}.{key}": name for key in keys}

    higher = [(n, engines(f"zero{n}")) for n in (1, 2, 3) if n > now]
    offload = [(9, engines("zero2_offload")), (10, engines("zero3_offload"))]
    frozen = "generator" if stage == "record" else "teacher"
    sharded = [] if plan.zero[frozen] == 3 else [(4, {f"{stage}.teacher_ds_config": "teacher"})]
    recompute = [] if settings.network.checkpointing else [(5, {"network.checkpointing": True})]
    pieces = [k for k in (2, 4, 8, 16, 32) if plan.micro % k == 0]
    smaller = [(6, {f"{stage}.accumulation": s.accumulation * k}) for k in pieces]
    split = []
    if stage == "backtrack":
        split = [(7, {"backtrack.generator_split": k}) for k in pieces if k > s.generator_split]
    lora = [] if settings.lora.rank else [(11, {"lora.rank": LORA_RANK})]
    return [[none, *values] for values in (higher + offload, sharded, recompute, smaller, split, lora)]


def _candidates(settings: RunSettings, plan: StagePlan) -> Iterator[dict]:
    """Overrides from the smallest change to the largest: fewer keys' worth of changes first, then lower ranks."""
    found = []
    for choice in product(*_choices(settings, plan)):
        ranks = sorted((rank for rank, _ in choice if rank), reverse=True)
        if ranks:
            overrides = {k: v for _, part in choice for k, v in part.items()}
            size = [v for k, v in overrides.items() if k.endswith(("accumulation", "generator_split"))]
            found.append(((len(ranks), ranks, size), overrides))
    yield from (overrides for _, overrides in sorted(found, key=lambda item: item[0]))


def smallest_change(
    settings: RunSettings, architecture: Architecture, ranks: int, stage: str, limit: float
) -> tuple[dict, StagePlan] | None:
    """The first change of settings under which the stage's peak is at most `limit` bytes, and its plan; None if there is
    none. Offloading the optimizer and LoRA come last: they cost speed, and what can be learned."""
    build: Callable = PLANS[stage]
    for overrides in _candidates(settings, build(settings, architecture, ranks)):
        try:
            plan = build(changed(settings, overrides), architecture, ranks)
        except UserError:
            continue
        if plan.peak[1] <= limit:
            return overrides, plan
    return None


def teacher_advice(settings: RunSettings, architecture: Architecture, ranks: int, limit: float) -> str:
    """Whether the teacher is better whole or sharded, and why."""
    whole, parted = (
        PLANS["backtrack"](changed(settings, {"backtrack.teacher_ds_config": name}), architecture, ranks)
        for name in ("zero0", "teacher")
    )
    freed = (whole.peak[1] - parted.peak[1]) / 1e9
    sent = (parted.traffic - whole.traffic) / 1e9
    if ranks == 1:
        return "whole: with one GPU there is nobody to share it with"
    cost = f"sharded it frees {freed:.1f} GB at the peak and costs {sent:.2f} GB more sent a step and GPU"
    if whole.peak[1] <= limit:
        return f"whole (backtrack.teacher_ds_config=zero0): it fits; {cost}"
    if parted.peak[1] <= limit:
        return f"sharded (backtrack.teacher_ds_config=teacher): whole it does not fit; {cost}"
    return f"sharded (backtrack.teacher_ds_config=teacher), though that alone is not enough; {cost}"
