"""Students written as plain diffusers pipelines: the network, a scheduler that steps as it does, all else copied."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin

from models.diffusion import FLOW
from models.errors import ModelError
from models.families import family_of, read_json
from models.pipeline import LORA_FOLDER, NOTE, replace_folder, variant_name, variant_of, weight_files


def one_step_scheduler(source: Path, timestep: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """A scheduler whose single step starts at the conditioning timestep and ends at x0, so that a plain pipeline call
    needs no `timesteps=`.

    With betas it is the teacher's schedule cut off behind t_g: with trailing spacing one step starts at its last
    timestep, which is t_g, and with `set_alpha_to_one` that step returns x0 itself. A flow's always starts at sigma = 1,
    which is why that is a flow generator's only conditioning timestep.
    """
    config = read_json(Path(source) / "scheduler" / "scheduler_config.json")
    if config["_class_name"] == FLOW:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config["num_train_timesteps"], shift=1.0)
    full = DDIMScheduler.from_config(config)
    return DDIMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=full.betas[: timestep + 1].tolist(),
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        steps_offset=1,  # not used by trailing spacing; SD's pipeline warns of any other value
        clip_sample=False,
        set_alpha_to_one=True,
    )


def student_scheduler(source: Path, timesteps: tuple[int, ...]) -> SchedulerMixin:
    """The scheduler that a plain diffusers pipeline samples a student with.

    Several steps are those of a consistency model: x0, fresh noise, the next timestep. `LCMScheduler` does that; its
    configuration can hold evenly spaced timesteps t_j = t_0 - floor(j (t_0 + 1) / n), such as 999, 749, 499, 249, and no
    others (`student_call` says which call is needed). Its boundary condition is switched off by a large
    `timestep_scaling`: the student's x0 is the network's. Raises ModelError for several steps of a flow.
    """
    if len(timesteps) == 1:
        return one_step_scheduler(source, timesteps[0])
    config = read_json(Path(source) / "scheduler" / "scheduler_config.json")
    if config["_class_name"] == FLOW:
        raise ModelError(f"{source} is a flow: no scheduler of a plain pipeline makes the steps {list(timesteps)}")
    steps = timesteps[0] + 1
    return LCMScheduler(
        num_train_timesteps=steps,
        original_inference_steps=steps,
        trained_betas=DDIMScheduler.from_config(config).betas[:steps].tolist(),
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_scaling=1e6,
        steps_offset=1,  # not used, as above
        clip_sample=False,
        set_alpha_to_one=True,
    )


def student_call(scheduler: SchedulerMixin, timesteps: tuple[int, ...]) -> str:
    """How a plain pipeline with this scheduler makes an image; `timesteps=` only if the scheduler cannot hold them."""
    scheduler.set_timesteps(len(timesteps))
    held = scheduler.timesteps.tolist() == list(timesteps)
    how = f"num_inference_steps={len(timesteps)}" if held else f"timesteps={list(timesteps)}"
    return f"pipe(prompt, {how}, guidance_scale=0.0)"


def _copy_part(source: Path, out: Path, variant: str) -> None:
    """Copies one part of a pipeline: its weights (of the variant, under plain names) and all that is not weights."""
    skip = shutil.ignore_patterns(
        "*.safetensors*", "*.bin", "*.bin.index*.json", "*.ckpt", "*.onnx*", "*.msgpack", "*.h5", ".*"
    )
    shutil.copytree(source, out, ignore=skip)
    stem = next((s for s in ("diffusion_pytorch_model", "model") if any(source.glob(f"{s}*.safetensors"))), None)
    if stem is None:
        return  # a tokenizer
    files = weight_files(source, variant, stem)
    variant = variant_of(files, variant)
    for file in files:
        shutil.copyfile(file, out / (file.name.replace(f".{variant}", "") if variant else file.name))
    index = source / variant_name(f"{stem}.safetensors.index.json", variant or "")
    if len(files) > 1:
        text = index.read_text()
        (out / f"{stem}.safetensors.index.json").write_text(text.replace(f".{variant}", "") if variant else text)


def write_student_pipeline(
    source: Path,
    network: Path | Callable[[Path], None],
    timesteps: tuple[int, ...],
    out: Path,
    note: dict,
    variant: str = "",
    lora: Path | None = None,
) -> str:
    """Writes a pipeline folder with the denoiser of the folder `network` (or what `network` writes into the folder that it
    is given), all else from `source`, that steps at `timesteps`. Returns the call that makes an image with it. Only the
    parts that model_index.json names are copied; a part that is not there (the hub's safety checker is not fetched) is
    left out of the index.

    `note` is kept as disback.json; a LoRA folder is copied as `lora/`. Atomic: an existing pipeline at `out` is replaced as a whole. Raises ModelError.
    """
    scheduler = student_scheduler(source, timesteps)
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
        shutil.copytree(lora, temporary / LORA_FOLDER)
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    call = student_call(scheduler, timesteps)
    about = {"conditioning_timestep": timesteps[0], "timesteps": list(timesteps), "call": call, **note}
    (temporary / NOTE).write_text(json.dumps(about, indent=2) + "\n")
    replace_folder(temporary, out)
    return call
