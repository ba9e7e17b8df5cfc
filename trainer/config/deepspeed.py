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


def deepspeed_config(name: str, micro: int, accumulation: int, clip: float, precision: str, processes: int) -> dict:
    """A complete DeepSpeed configuration.

    name: a file of `ds_configs/` without its ending, or a path. Raises UserError for a missing or broken file and for
    a key that belongs to the YAML.
    """
    file = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        known = ", ".join(sorted(f.stem for f in DS_CONFIGS.glob("*.json")))
        raise UserError(
            f"DeepSpeed configuration {file} cannot be read ({error.strerror}); known names: {known}"
        ) from error
    except json.JSONDecodeError as error:
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
    return config | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * processes,
        "gradient_clipping": clip,
        "bf16": {"enabled": precision == "bf16"},
        # Ours to log; DeepSpeed's own lines would synchronise the device.
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
    }
