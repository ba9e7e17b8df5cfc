"""Teacher pipelines: what is refused before any weight is read, and variants of weight files."""

import json
import shutil
from pathlib import Path

import pytest
import support
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from models.errors import ModelError
from models.files import POINTER, weight_files
from models.generator_pipeline import generator_scheduler, write_generator_pipeline
from models.miniature import build_miniature
from models.pipeline import load_network, load_schedule, load_text, weights_hash
from models.sampler import Sampler
from models.settings import MiniatureSettings
from models.validate import check_fit, check_pipeline
from trainer.backtrack import backtrack
from trainer.distributed.world import World
from trainer.record import record
from trainer.training.run import Run

CPU = torch.device("cpu")
SCHEDULER = "scheduler/scheduler_config.json"
LFS = POINTER + b"v1\noid sha256:00\nsize 1\n"
DROP = "(dropped)"  # a value that `edited` leaves out


def build(kind: str, folder: Path, **save: object) -> Path:
    sizes = {"unet_channels": (16, 32), "vae_channels": (16, 16), "text_widths": (8, 8), "pooled": 16}
    build_miniature(MiniatureSettings(family=kind, **sizes)).save_pretrained(folder, **save)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    return {kind: build(kind, root / kind) for kind in ("sdxl", "sd15", "sd3")}


def edited(source: Path, folder: Path, file: str, **values: object) -> Path:
    """A copy of a pipeline with some values of one of its configurations changed."""
    shutil.copytree(source, folder)
    config = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value != DROP}))
    return folder


@pytest.mark.parametrize(
    ("kind", "file", "values", "words"),
    [
        ("sd15", "model_index.json", {"_class_name": "FluxPipeline"}, "unsupported pipeline FluxPipeline: use one of"),
        (
            "sd15",
            "scheduler/scheduler_config.json",
            {"prediction_type": "velocity"},
            "unknown prediction_type 'velocity'",
        ),
        ("sd3", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("sd15", "unet/config.json", {"in_channels": 9}, "9 input and 4 output channels.*no inpainting"),
        (
            "sd15",
            "unet/config.json",
            {"addition_embed_type": "text_time"},
            "not the denoiser of a StableDiffusionPipeline",
        ),
        ("sdxl", "vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean"),
        ("sd15", "model_index.json", {"unet": None}, r"model_index.json has unet: null, two names are expected"),
        (
            "sd15",
            "model_index.json",
            {"text_encoder": ["transformers"]},
            r"has text_encoder: \['transformers'\], two names",
        ),
        ("sd15", "model_index.json", {"tokenizer": [None, None]}, r"has tokenizer: \[None, None\], two names"),
        ("sd3", "model_index.json", {"text_encoder_3": None}, r"has text_encoder_3: null.* or \[null, null\]"),
        ("sd15", "model_index.json", {"text_encoder": ["transformers", "X"]}, "no class of transformers"),
        ("sdxl", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is timestep.*more than text"),
        ("sd15", "unet/config.json", {"num_class_embeds": 3}, "num_class_embeds is 3"),
        ("sd15", "unet/config.json", {"quantization_config": {}}, "has a quantization_config"),
        ("sd15", "unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type is image_proj"),
        ("sd15", "unet/config.json", {"in_channels": "4"}, "in_channels is 4 in its config.json, a whole number"),
        ("sd15", "unet/config.json", {"in_channels": DROP}, "in_channels is missing in its config.json"),
        ("sdxl", "unet/config.json", {"addition_time_embed_dim": DROP}, "addition_time_embed_dim is missing"),
        ("sd3", "transformer/config.json", {"patch_size": DROP}, "patch_size is missing"),
        ("sd15", "vae/config.json", {"latent_channels": DROP}, "vae/config.json has no latent_channels"),
        ("sd15", SCHEDULER, {"beta_schedule": "sine"}, "unknown beta_schedule 'sine': use one of linear"),
        ("sd15", SCHEDULER, {"beta_start": "low"}, "no schedule can be made of its betas"),
        (
            "sd15",
            SCHEDULER,
            {"trained_betas": [0.1, 0.2]},
            "one number from 0 to 1 per timestep .2 of num_train_timesteps=1000",
        ),
        ("sd15", SCHEDULER, {"trained_betas": [-0.1] * 1000}, "one number from 0 to 1 per timestep"),
        ("sd15", SCHEDULER, {"prediction_type": None}, "unknown prediction_type null: use one of epsilon"),
        ("sd3", SCHEDULER, {"num_train_timesteps": None}, "num_train_timesteps is null: set a whole number"),
        ("sd15", SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_pipelines_that_cannot_be_distilled(whole, tmp_path, kind, file, values, words):
    check_pipeline(whole[kind])
    with pytest.raises(ModelError, match=words):
        check_pipeline(edited(whole[kind], tmp_path / "p", file, **values))


def test_configurations_that_are_no_objects(whole, tmp_path):
    folder = shutil.copytree(whole["sd15"], tmp_path / "p")
    for text, words in (
        (b"[]", "holds a JSON list, an object is expected"),
        ("{}".encode("utf-16"), "not JSON"),
        (LFS, "only the Git LFS pointer"),
    ):
        (folder / "model_index.json").write_bytes(text)
        with pytest.raises(ModelError, match=f"model_index.json: {words}"):
            check_pipeline(folder)


def test_schedules_as_diffusers_makes_them(whole, tmp_path):
    """trained_betas alone, and a schedule's length where the file leaves it out."""
    betas = torch.linspace(0.001, 0.02, 50).tolist()
    values = {"trained_betas": betas, "num_train_timesteps": 50, "beta_start": DROP, "beta_schedule": "mine"}
    folder = edited(whole["sd15"], tmp_path / "betas", SCHEDULER, **values)
    schedule = load_schedule(check_pipeline(folder))
    assert torch.allclose(schedule.alphas**2, (1 - torch.tensor(betas)).cumprod(0)) and schedule.steps == 50
    scheduler = generator_scheduler(folder, (39,))
    assert torch.equal(scheduler.betas, torch.tensor(betas[:40]))
    sampler = Sampler.load(folder, (8, 8), torch.float32, CPU)
    assert torch.equal(sampler.scheduler(50).betas, torch.tensor(betas))
    with pytest.raises(ModelError, match="sample.steps=51: the pipeline's schedule has 50 timesteps: set at most 50"):
        sampler.scheduler(51)
    flow = edited(whole["sd3"], tmp_path / "flow", SCHEDULER, num_train_timesteps=DROP)
    assert load_schedule(check_pipeline(flow)).last == 1000
    assert generator_scheduler(flow, (1000,)).config.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd3", "transformer/config.json"),
        ("sd3", "text_encoder_3/model.safetensors"),
        ("sdxl", "tokenizer_2"),
        ("sd15", "vae/diffusion_pytorch_model.safetensors"),
        ("sd15", "scheduler/scheduler_config.json"),
    ],
)
def test_missing_parts_are_named(whole, tmp_path, kind, name):
    folder = shutil.copytree(whole[kind], tmp_path / "p")
    gone = folder / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        check_pipeline(folder)


def test_settings_that_do_not_fit(whole):
    """The autoencoder halves the side; the transformer's patches halve it again, and it has 2 x 2 positions."""
    check_fit(whole["sd15"], 10, (399,)), check_fit(whole["sd3"], 8, (1000,))
    check_fit(whole["sd15"], 8, (999, 749, 499, 249))
    for kind, resolution, timesteps, words in (
        ("sd15", 9, (399,), "data.resolution=9 is not a multiple of 2 .* use 8"),
        ("sd3", 10, (1000,), "data.resolution=10 is not a multiple of 4"),
        ("sd3", 12, (1000,), "at most 8 pixels"),
        ("sd15", 8, (1000,), "end at 999: set a smaller one"),
        ("sd3", 8, (399,), "set conditioning_timestep=1000"),
        ("sd15", 8, (1000, 500), r"student_timesteps=\[1000, 500\]: .*end at 999"),
        ("sd3", 8, (1000, 500), r"student_timesteps=\[1000, 500\]: .* is a flow.*student_timesteps=\[\]"),
    ):
        with pytest.raises(ModelError, match=words):
            check_fit(whole[kind], resolution, timesteps)


def test_nothing_is_made_of_a_pipeline_that_does_not_fit(shards, whole, tmp_path):
    for verb in (record, backtrack):
        run = Run(support.tiny(shards, "unfit", f"pipeline={whole['sd3']}", f"path={tmp_path}/p"), World(0, 1, 0, CPU))
        with pytest.raises(ModelError, match="conditioning_timestep=749: .* set conditioning_timestep=1000"):
            verb(run)
        assert not run.folder.exists() and not (tmp_path / "p").exists()


def test_pickle_weights_are_refused_with_the_way_out(whole, tmp_path):
    folder = shutil.copytree(whole["sd15"], tmp_path / "p")
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            kind = "pytorch_model.bin" if file.name == "model.safetensors" else file.with_suffix(".bin").name
            torch.save(load_file(file), folder / part / kind)
            file.unlink()
    with pytest.raises(
        ModelError, match=r"\*\.bin.*python -c .*use_safetensors=False.*safe_serialization=True"
    ) as refusal:
        check_pipeline(folder)
    # What the message says must work.
    code = str(refusal.value).partition('python -c "')[2].rpartition('"')[0]
    exec(code.replace("PIPELINE", str(folder)).replace("CONVERTED", str(tmp_path / "c")))
    check_pipeline(tmp_path / "c")
    one, two = (load_network(f / "unet").state_dict() for f in (whole["sd15"], tmp_path / "c"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_variants(whole, tmp_path, shard):
    """A folder with fp16 and plain files, single or sharded with an index: the variant is what is loaded, hashed and
    exported, there under plain names."""
    half = build_miniature(MiniatureSettings(family="sd15", unet_channels=(16, 32), text_widths=(8, 8), seed=1)).to(
        torch.half
    )
    half.save_pretrained(tmp_path / "p", variant="fp16", max_shard_size=shard)
    folder, unet = tmp_path / "p", tmp_path / "p" / "unet"
    assert (len(weight_files(unet, "fp16")) > 1) == (shard == "200KB")
    with pytest.raises(ModelError, match="of the variant fp16 only: set variant=fp16"):
        weight_files(unet)
    check_fit(check_pipeline(folder, "fp16"), 8, (399,), "fp16")
    assert all(".fp16" in f.name for f in weight_files(unet, "fp16"))
    expected = half.unet.state_dict()
    loaded = load_network(unet, variant="fp16").state_dict()
    assert all(torch.equal(v, expected[k].float()) for k, v in loaded.items())
    digest = weights_hash(unet, "fp16")
    text = load_text(folder, torch.float32, CPU, "fp16").text_encoder.state_dict()
    assert all(torch.equal(v, half.text_encoder.state_dict()[k].float()) for k, v in text.items())
    write_generator_pipeline(folder, whole["sd15"] / "unet", (399,), tmp_path / "out", {}, "fp16")
    assert not list((tmp_path / "out").rglob("*fp16*"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, half.vae.state_dict()[k].float()) for k, v in pipe.vae.float().state_dict().items())
    # Beside them the plain files of another network: the setting decides.
    for file in (whole["sd15"] / "unet").glob("*.safetensors"):
        shutil.copy(file, unet)
    assert weights_hash(unet, "fp16") == digest != weights_hash(unet) == weights_hash(whole["sd15"] / "unet")
    with pytest.raises(ModelError, match=r"variant=bf16: .*no diffusion_pytorch_model.bf16.safetensors"):
        check_fit(folder, 8, (399,), "bf16")
