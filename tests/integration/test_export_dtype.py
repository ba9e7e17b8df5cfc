"""What `export.dtype` makes of a checkpoint's float32 weights: rounded once, and never infinite."""

import shutil

import pytest
import support
import torch
from safetensors.torch import load_file, save_file

from models.files import LORA_FILE, WEIGHTS_FILE
from models.lora import adapter_parameters, add_adapter
from models.pipeline import load_network, weights_hash
from models.settings import LoraSettings
from trainer.engine.save_weights import Snapshot
from trainer.errors import UserError
from trainer.export import export
from trainer.training.run import Run


def exported(root, world, pipeline, dtype, state, *flags):
    """The denoiser's file of an export of these weights, and the run."""
    place = ("precision=bf16", f"pipeline={pipeline}", f"export.dtype={dtype}", *flags)
    run = Run(support.tiny(root, "export-dtype", *place), world)
    stage = run.stage_folder("backtrack")
    weights = stage / "checkpoints" / "step-00000004" / "weights"
    if isinstance(state, Snapshot):
        state.write(weights)
    else:
        shutil.rmtree(weights, ignore_errors=True)
        shutil.copytree(run.teacher_folder, weights)
        save_file(state, weights / WEIGHTS_FILE, {"format": "pt"})
    (stage / "LATEST").write_text("step-00000004\n")
    shutil.rmtree(run.folder / "generator", ignore_errors=True)
    export(run)
    return load_file(run.folder / "generator" / "unet" / WEIGHTS_FILE), run


def test_weights_are_rounded_once_and_stay_finite(shards, world, pipeline, capsys):
    state = load_file(pipeline / "unet" / WEIGHTS_FILE)
    for dtype, expected in (("auto", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found, _ = exported(shards, world, pipeline, dtype, state)
        assert all(torch.equal(value, state[key].to(expected)) for key, value in found.items()), dtype
    found, _ = exported(shards, world, pipeline, "auto", state, "precision=fp32")
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    state["conv_in.bias"][0] = -7e4
    said = r"export\.dtype=fp16: .*weights: conv_in\.bias has a weight of size 7e\+04, .* float16 is 6\.55e\+04.*--dtype fp32"
    with pytest.raises(UserError, match=said):
        exported(shards, world, pipeline, "fp16", state)
    found, run = exported(shards, world, pipeline, "auto", state)
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    assert "conv_in.bias has a weight of size 7e+04" in (run.folder / "backtrack" / "log.txt").read_text()


def test_an_adapter_is_merged_in_float32(shards, world, pipeline):
    """Rounded after the sum, not before; kept apart, it is rounded and its base is not."""
    base = load_network(pipeline / "unet")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    add_adapter(base, LoraSettings(rank=2, alpha=4, targets=["to_q"]), "export")
    draw = torch.Generator().manual_seed(0)
    state = {k: 1e-2 * torch.randn(p.shape, generator=draw) for k, p in adapter_parameters(base).items()}
    snapshot = Snapshot.of_adapter(state, base, weights_hash(pipeline / "unet"))
    found, run = exported(shards, world, pipeline, "auto", snapshot, "lora.rank=2", "lora.targets=[to_q]")
    for key, value in found.items():
        name = f"unet.{key.removesuffix('.weight')}.lora_"
        exact = before[key]
        if f"{name}A.weight" in state:
            exact = exact + 2 * state[f"{name}B.weight"] @ state[f"{name}A.weight"]
        assert torch.equal(value, exact.half()), key
    _, run = exported(
        shards, world, pipeline, "auto", snapshot, "lora.rank=2", "lora.targets=[to_q]", "export.merge=false"
    )
    beside = load_file(run.folder / "generator" / "lora" / LORA_FILE)
    assert all(torch.equal(value, state[key].half()) for key, value in beside.items())
    kept = (run.folder / "generator" / "unet" / WEIGHTS_FILE).read_bytes()
    assert kept == (pipeline / "unet" / WEIGHTS_FILE).read_bytes()
