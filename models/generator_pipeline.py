"""Generators as plain diffusers pipelines: the network, a scheduler with its timesteps, the other parts copied."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, ModelMixin, SchedulerMixin
from safetensors import safe_open
from torch import Tensor

from models.diffusion import FLOW, train_timesteps
from models.errors import ModelError
from models.families import family_of
from models.files import INFO_FILE, LORA_FOLDER, STEM, read_json, variant_name, variant_of, weight_files
from models.pipeline import replace_folder
from models.tensorfile import TensorFile, write_tensors


class OutOfRangeError(ModelError):
    """A weight is too large for the dtype that it should be rounded to."""


def _rounded(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in another dtype; any other tensor as it is. Raises OutOfRangeError if a value would become
    infinite."""
    if not value.is_floating_point():
        return value
    out = value.to(dtype)
    if (lost := out.isinf() & ~value.isinf()).any():
        name = str(dtype).removeprefix("torch.")
        largest, limit = float(value[lost].abs().max()), torch.finfo(dtype).max
        raise OutOfRangeError(f"{key} has a weight of size {largest:.4g}, and the largest of {name} is {limit:.4g}")
    return out


def copy_rounded(source: Path, dtype: torch.dtype, out: Path) -> None:
    """Copies a weights or LoRA folder, with its weights rounded to `dtype`. Raises OutOfRangeError, ModelError."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in weight_files(source):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()  # of a LoRA: its rank and alpha
        tensors = TensorFile(file)
        try:
            state = {
                key: _rounded(key, tensors.read(key, 0, math.prod(shape)).view(shape), dtype)
                for key, shape in tensors.shapes.items()
            }
        finally:
            tensors.close()
        write_tensors(out / file.name, state, metadata)


def save_rounded(network: ModelMixin, dtype: torch.dtype, out: Path) -> None:
    """Rounds a network's weights to `dtype`, in place, and writes its folder. Raises OutOfRangeError."""
    for key, value in network.state_dict(keep_vars=True).items():
        value.data = _rounded(key, value.data, dtype)
    network.save_pretrained(out)


def one_step_scheduler(source: Path, timestep: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """A scheduler whose single step leads from the conditioning timestep to x0, so that a plain pipeline call needs no
    `timesteps=`.

    With betas, it is the teacher's schedule truncated after t_g: with trailing spacing, one step starts at the last
    timestep, which is t_g, and with `set_alpha_to_one` that step returns x0 itself. A flow scheduler always starts at
    sigma = 1, so a flow generator can have no other conditioning timestep.
    """
    config = read_json(Path(source) / "scheduler" / "scheduler_config.json")
    if config.get("_class_name") == FLOW:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=train_timesteps(config), shift=1.0)
    full = DDIMScheduler.from_config(config)
    return DDIMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=full.betas[: timestep + 1].tolist(),
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        steps_offset=1,  # unused with trailing spacing; SD's pipeline warns about any other value
        clip_sample=False,
        set_alpha_to_one=True,
    )


def generator_scheduler(source: Path, timesteps: tuple[int, ...]) -> SchedulerMixin:
    """The scheduler with which a plain diffusers pipeline samples from a generator.

    Several steps are those of a consistency model: x0, fresh noise, next timestep. `LCMScheduler` does this; its
    configuration can only express evenly spaced timesteps t_j = t_0 - floor(j (t_0 + 1) / n), such as 999, 749, 499,
    249 (see `pipeline_call` for others). A large `timestep_scaling` disables its boundary condition, so that x0 is the
    network's. Raises ModelError for several steps of a flow.
    """
    if len(timesteps) == 1:
        return one_step_scheduler(source, timesteps[0])
    config = read_json(Path(source) / "scheduler" / "scheduler_config.json")
    if config.get("_class_name") == FLOW:
        raise ModelError(f"{source} is a flow: no diffusers scheduler has the steps {list(timesteps)}: use one step")
    steps = timesteps[0] + 1
    return LCMScheduler(
        num_train_timesteps=steps,
        original_inference_steps=steps,
        trained_betas=DDIMScheduler.from_config(config).betas[:steps].tolist(),
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_scaling=1e6,
        steps_offset=1,  # unused, as above
        clip_sample=False,
        set_alpha_to_one=True,
    )


def pipeline_call(scheduler: SchedulerMixin, timesteps: tuple[int, ...]) -> str:
    """The call that makes an image with this scheduler; `timesteps=` only if its configuration cannot express them."""
    scheduler.set_timesteps(len(timesteps))
    default = scheduler.timesteps.tolist() == list(timesteps)
    steps = f"num_inference_steps={len(timesteps)}" if default else f"timesteps={list(timesteps)}"
    return f"pipe(prompt, {steps}, guidance_scale=0.0)"


def _copy_part(source: Path, out: Path, variant: str) -> None:
    """Copies one part of a pipeline: its weights (of the variant, but with plain names) and all other files."""
    skip = shutil.ignore_patterns(
        "*.safetensors*", "*.bin", "*.bin.index*.json", "*.ckpt", "*.onnx*", "*.msgpack", "*.h5", ".*"
    )
    shutil.copytree(source, out, ignore=skip)
    stem = next((s for s in (STEM, "model") if any(source.glob(f"{s}*.safetensors"))), None)
    if stem is None:
        return  # a tokenizer
    files = weight_files(source, variant, stem)
    suffix = f".{variant}" if variant_of(files, variant) else ""
    for file in files:
        shutil.copyfile(file, out / file.name.replace(suffix, ""))
    if len(files) > 1:
        index = f"{stem}.safetensors.index.json"
        text = (source / variant_name(index, suffix[1:])).read_text()
        (out / index).write_text(text.replace(suffix, ""))


def write_generator_pipeline(
    source: Path,
    network: Path | Callable[[Path], None],
    timesteps: tuple[int, ...],
    out: Path,
    note: dict,
    variant: str = "",
    lora: Callable[[Path], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> str:
    """Writes a generator as a pipeline folder, and returns the call that makes an image with it.

    source: the pipeline that all other parts are copied from. Only those in model_index.json are; missing ones (such as
    the hub's safety checker, which is not downloaded) are set to null in the index. network: the denoiser's folder, or
    a function that writes it into the folder passed to it. note: additional entries for disback.json. lora: writes a LoRA
    into the folder `lora/`. finish: writes more files into the finished folder, which is then still elsewhere. Atomic:
    replaces an existing pipeline at `out` as a whole. Raises ModelError.
    """
    scheduler = generator_scheduler(source, timesteps)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    index, own = read_json(source / "model_index.json"), family_of(source).part
    for part in [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None]:
        if part == own and callable(network):
            network(temporary / own)
        elif part == own:
            _copy_part(network, temporary / own, variant)
        elif part == "scheduler":
            scheduler.save_pretrained(temporary / part)
            index[part] = ["diffusers", type(scheduler).__name__]
        elif (source / part).is_dir():
            _copy_part(source / part, temporary / part, variant)
        else:
            index[part] = [None, None]
    if lora:
        lora(temporary / LORA_FOLDER)
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    call = pipeline_call(scheduler, timesteps)
    info = {"conditioning_timestep": timesteps[0], "timesteps": list(timesteps), "call": call, **note}
    (temporary / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")
    if finish:
        finish(temporary)
    replace_folder(temporary, out)
    return call
