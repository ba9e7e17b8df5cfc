"""DeepSpeed's JSON files and the YAML's settings, merged in one place. Contradictions are refused."""

import json
from pathlib import Path

from trainer.errors import UserError

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
WITHIN_NODE = "shard_within_node"  # our own key in a JSON: sharded over the processes of each node, not over all
# These have one owner, the YAML: a DeepSpeed JSON that says otherwise would silently win.
OURS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "clip",
    "bf16": "precision",
    "fp16": "precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "data_types": "network.grad_accum_dtype",
    "communication_data_type": "network.grad_accum_dtype",
}


def micro_batch(batch: int, accumulation: int, processes: int, where: str) -> int:
    """Samples of one rank in one micro-step. where: the section of the settings, for the message. Raises UserError if the
    global batch does not divide."""
    parts = processes * accumulation
    if batch % parts:
        near = max(batch // parts, 1) * parts
        raise UserError(
            f"{where}.batch={batch} does not divide into {processes} processes x {accumulation} accumulation steps: "
            f"use {near} or another multiple of {parts}"
        )
    return batch // parts


def check_split(pieces: int, batch: int, accumulation: int, processes: int) -> None:
    """Raises UserError unless the generator's micro-batch divides into `backtrack.generator_split` pieces."""
    micro = micro_batch(batch, accumulation, processes, "backtrack")
    if micro % pieces:
        fits = ", ".join(str(n) for n in range(1, micro + 1) if micro % n == 0)
        raise UserError(
            f"backtrack.generator_split={pieces} does not divide the micro-batch of {micro} (batch {batch} over {processes} "
            f"processes x {accumulation} accumulation steps): use one of {fits}"
        )


def check_role(name: str, config: dict, trained: bool, compiled: str = "") -> None:
    """Raises UserError unless a role can run with a `deepspeed_config`. compiled: the configuration's name, if network.compile
    is on."""
    stage, within_node = config["zero_optimization"]["stage"], config.get(WITHIN_NODE, False)
    if not trained and stage not in (0, 3):
        raise UserError(f"{name}: a frozen role runs at ZeRO stage 0 or 3, not {stage}: use zero0 or teacher")
    if within_node and (trained or stage != 3):
        raise UserError(f"{name}: `{WITHIN_NODE}` is for a frozen role at ZeRO stage 3, such as teacher_node")
    if compiled and stage == 3:
        raise UserError(
            f"network.compile=true does not work with ZeRO-3 ({name}: {compiled}), which gathers weights inside the compiled "
            "blocks: use zero0, zero1 or zero2, or network.compile=false"
        )


def deepspeed_config(
    name: str, micro: int, accumulation: int, clip: float, precision: str, processes: int, fp32_gradients: bool = False
) -> dict:
    """A complete DeepSpeed configuration.

    name: a file of `ds_configs/` without its ending, or a path. fp32_gradients: sums gradients in float32, whatever the
    precision. Raises UserError for a missing or broken file and for a key that belongs to the YAML.
    """
    file = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        known = ", ".join(sorted(f.stem for f in DS_CONFIGS.glob("*.json")))
        raise UserError(
            f"DeepSpeed configuration {file} cannot be read ({error.strerror}); known names: {known}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed configuration {file} is not JSON: {error}") from error
    config.pop("comment", None)  # the reasons for the file's values
    for key, owner in OURS.items():
        if key in config:
            raise UserError(f"{file}: '{key}' is set by `{owner}` in the YAML: remove it from the JSON")
    if config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) > 1:
        raise UserError(
            f"{file}: zero_hpz_partition_size keeps second copies that a change of weights would not reach: use the "
            f"teacher_node configuration (`{WITHIN_NODE}`) for a frozen role, or remove it"
        )
    if fp32_gradients and precision == "bf16":
        if not config.get("zero_optimization", {}).get("stage"):
            raise UserError(
                f"network.grad_accum_dtype=fp32 does not work with {name}: at ZeRO-0 DeepSpeed sums bf16 gradients in bf16 "
                "only: use zero1, zero2 or zero3, or network.grad_accum_dtype=auto"
            )
        # The sums over micro-steps, and those over ranks.
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return config | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * processes,
        "gradient_clipping": clip,
        # GuardedAdamW skips updates with a NaN or an infinity. DeepSpeed's own check takes 15 kernels per parameter, and the
        # host waits for it.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        # Ours to log and to time; DeepSpeed's own lines and its throughput timer, on by default, synchronise the device.
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
    }
