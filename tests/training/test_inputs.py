"""Encoded shards: what is in them, that training on them is training on their images, and what is refused."""

import json
import shutil
from collections import Counter

import pytest
import support
import torch

from data.encoded import encoding_of_shards
from data.errors import DataError
from data.loader import Batches
from data.sampling_order import BatchSplit
from data.shard_dataset import ShardDataset
from data.shard_index import load_index
from data.shard_patterns import expand
from data.shard_writer import write_shards
from models.miniature import build_miniature
from models.pipeline import load_network
from models.settings import MiniatureSettings
from trainer import shards as command
from trainer.encode import Part
from trainer.errors import UserError
from trainer.pretrain import Pretraining
from trainer.record import Recording
from trainer.training.loop import train
from trainer.training.run import Run
from trainer.training.state_parts import SampleCounts

LONG = ", written by hand" * 5  # more than a caption's 16 tokens
SMALL = MiniatureSettings(unet_channels=(16, 32), vae_channels=(16, 16), text_widths=(8, 8), pooled=16)


def encode(source, out, pipeline, *more) -> int:
    call = ["--encode", f"{source}", "--out", f"{out}", "--pipeline", f"{pipeline}", "--resolution", "8", *more]
    return command.main(call)


@pytest.fixture(scope="module")
def place(shards):
    """A folder with a miniature, 40 digits in five shards ("plain"), and these encoded in float32, with text ("full")."""
    folder = shards / "cache"
    build_miniature(SMALL).save_pretrained(folder / "pipeline")
    digits = ShardDataset(expand(f"{shards}/shards/train-*.tar")[:1], 8)
    rows = [{"__key__": f"k{i}", "png": digits._read(i, "image"), **digits.read_text(i)} for i in range(40)]
    for row in rows[::3]:
        row["caption"] += LONG
    samples = [
        {"__key__": row["__key__"], "png": row["png"], "txt": row["caption"], "json": row["meta"]} for row in rows
    ]
    write_shards(samples, folder / "plain", "s", 8)
    assert encode(folder / "plain", folder / "full", folder / "pipeline", "--text", "--precision", "fp32") == 0
    return folder


def run(place, world, name, data, *overrides) -> Run:
    settings = support.tiny(place, name, f"pipeline={place}/pipeline", f"path={place / name}/path", *overrides)
    settings.data.train = str(place / data)
    settings.pretrain.start = str(place / "pipeline")
    return Run(settings, world)


def watch(stage) -> Counter:
    """Calls of the stage's encoders, in training steps."""
    calls = Counter()
    stage.sampler.text.parts.text_encoder.register_forward_hook(lambda *_: calls.update(["text"]))
    stage.sampler.vae.encoder.register_forward_hook(lambda *_: calls.update(["vae"]))
    return calls


def trained(kind, run, name, *args) -> tuple[dict, Counter]:
    stage, settings = kind(run, *args), getattr(run.settings, name)
    calls = watch(stage)
    train(stage, settings.loop, run.settings.health, run.stage_folder(name), run.world)
    return {f"{r}.{k}": v for r, role in stage.roles.items() for k, v in (role.state_dict() or {}).items()}, calls


def moved(place, weights, role) -> float:
    """How far training moved a weight of a role at most: what two equal runs must have done to say anything."""
    start = load_network(place / "pipeline" / "unet").state_dict()
    return max(float((weights[f"{role}.{key}"] - value).abs().max()) for key, value in start.items())


def test_an_encoded_sample_is_its_image_and_caption(place, world):
    plain, full = (ShardDataset(expand(f"{place / d}"), 8, w) for d, w in (
        ("plain", ("image", "caption", "meta")), ("full", ("caption", "meta", "latents", "text"))
    ))  # fmt: skip
    sampler = run(place, world, "look", "plain", "precision=fp32").sampler(place / "pipeline")
    one, other = (next(Batches(dataset, BatchSplit(1, 6), 0)) for dataset in (plain, full))
    assert one.captions == other.captions and other.images is None
    assert torch.equal(one.original_sizes, other.original_sizes) and torch.equal(one.crops, other.crops)
    mean, std = sampler.posterior(one.images)
    cond = sampler.text.encode(one.captions, (8, 8))
    fresh = {"latent_mean": mean, "latent_std": std, "states": cond.states, "pooled": cond.pooled}
    assert support.largest_difference(fresh, other.cached) < 1e-5
    assert all(b["class"] == a["class"] and b["cache"]["vae"] for a, b in zip(one.meta, other.meta, strict=True))
    only = ShardDataset(expand(f"{place / 'full'}"), 8, ("caption", "text"))[0]
    assert only["cached"].keys() == {"states", "pooled"}


def test_encoding_goes_on_and_is_split(place, tmp_path, monkeypatch, capsys):
    options = (place / "plain", tmp_path, place / "pipeline", "--text", "--precision", "fp32")
    stale = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{support.free_port()}",
    }
    for name, value in (
        stale | {"DISBACK_START_SECONDS": "1"}
    ).items():  # of a job that is gone: nobody does the other half
        monkeypatch.setenv(name, value)
    assert encode(*options) == 1 and not list(tmp_path.iterdir())
    assert "rank 1 (node unknown) did not answer within 1 s of the start (`unset RANK" in capsys.readouterr().err
    monkeypatch.delenv("LOCAL_RANK")
    assert encode(*options) == 2 and "RANK=0, WORLD_SIZE=2: LOCAL_RANK is not set" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # the second of two that are there
        patch.setattr(Part, "of_environment", lambda *_: Part(1, 2, torch.device("cpu")))
        patch.setenv("WORLD_SIZE", "1")
        assert encode(*options, "--batch", "8", "--workers", "1") == 0
    assert sorted(file.name for file in tmp_path.glob("*.tar")) == ["s-000001.tar", "s-000003.tar"]
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.tar")}
    (tmp_path / "s-000000.tar.tmp").write_bytes(b"half a shard")  # of an encoding that was killed
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert encode(*options) == 0
    assert "2 of 5 shards already exist" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == before for file, before in times.items())
    assert not list(tmp_path.glob("*.tmp"))
    for file in (place / "full").glob("*.tar"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert encode(*options[:3]) == 2  # without text: other shards under the same names
    assert "another text, precision" in capsys.readouterr().err


def test_a_broken_image_is_left_out(place, tmp_path, capsys):
    samples = [{"__key__": "a", "png": b"no png", "txt": "a"}]
    samples += [{"__key__": "b", "png": ShardDataset(expand(f"{place}/plain"), 8)._read(0, "image"), "txt": "b"}]
    write_shards(samples, tmp_path / "in", "s")
    assert encode(tmp_path / "in", tmp_path / "out", place / "pipeline") == 0
    assert "image does not decode" in capsys.readouterr().out
    index = load_index(tmp_path / "out" / "s-000000.tar")
    assert index.keys.tolist() == [b"b"] and index.extensions == ["json", "safetensors", "txt"]
    item = ShardDataset([index.tar], 8, ("caption", "latents"))[0]
    assert item["cached"]["latent_mean"].dtype == torch.bfloat16 and item["cached"].keys() == {
        "latent_mean",
        "latent_std",
    }


def test_captions_of_encoded_shards(place, tmp_path, capsys):
    """Captions from a field of the .json: in the encoded shards they are what they were, and another field is refused.
    Empty shards are skipped, in encoding and in training."""
    png = ShardDataset(expand(f"{place}/plain"), 8)._read(0, "image")
    captions = ["one", None, ["two"], "\ufeffthree"]
    samples = [{"__key__": f"k{i}", "png": png, "json": {"prompt": c, "b": "x"}} for i, c in enumerate(captions)]
    write_shards(samples, tmp_path / "in", "s")
    (tmp_path / "in" / "a.tar").write_bytes(b"\0" * 10240)
    (tmp_path / "in" / "._s-000000.tar").write_bytes(b"\0\5\x16\7")
    options = (tmp_path / "in", tmp_path / "out", place / "pipeline", "--text")
    check = ["--validate", f"{tmp_path}/in", "--resolution", "8", "--decode"]
    assert command.main(check) == 2 and "text fields prompt, b in the .json" in capsys.readouterr().err
    assert command.main([*check, "--caption-key", "json"]) == 2 and "--caption-field" in capsys.readouterr().err
    assert command.main([*check, "--caption-field", "prompt"]) == 0
    said = capsys.readouterr().out
    assert "2 usable samples" in said and "a.tar" in said and "hidden .tar file" in said and "caption is null" in said
    assert encode(*options, "--caption-field", "prompt") == 0
    said = capsys.readouterr().out
    assert "skips 1 empty shards: a.tar" in said and "'caption is a list, not text': 1" in said
    assert encode(*options, "--caption-field", "b") == 2 and "another captions" in capsys.readouterr().err
    (tmp_path / "out" / "a.tar").write_bytes(b"")
    found = ShardDataset(expand(f"{tmp_path}/out"), 8, ("caption", "text"), caption_field="prompt", caption_key="cap")
    assert {found.read(row)["caption"] for row in range(len(found))} == {"one", "three"}
    assert (
        found.rejected == {"empty shard": 1}
        and encoding_of_shards(expand(f"{tmp_path}/out"))["captions"] == "field prompt"
    )


def test_pretraining_from_the_cache_is_pretraining_from_images(place, world):
    more = ("precision=fp32", "pretrain.optimizer.eps=1e-4", "pretrain.steps=6", "pretrain.optimizer.warmup=0")
    fresh, worked = trained(Pretraining, run(place, world, "fresh", "plain", *more), "pretrain", place / "pipeline")
    cached, idle = trained(Pretraining, run(place, world, "cached", "full", *more), "pretrain", place / "pipeline")
    assert worked["vae"] == worked["text"] == 6 and not idle
    batches = Batches(ShardDataset(expand(f"{place / 'plain'}"), 8), BatchSplit(1, 8), 0)
    long = [sum(caption.endswith(LONG) for caption in next(batches).captions) for _ in range(6)]
    for name, counts in (("fresh", long), ("cached", [0] * 6)):
        lines = support.metrics(place / name / "pretrain")
        assert [line["truncated_captions"] for line in lines] == [sum(counts[: line["step"]]) for line in lines]
    assert sum(long) > 0
    assert support.largest_difference(fresh, cached) < 1e-5
    assert moved(place, fresh, "teacher") > 1e-3


def test_counts_of_samples_are_kept(world):
    counts = SampleCounts(world)
    counts.load_state_dict({"no image": 2})  # of a version that did not count captions
    counts.truncated += 3
    again = SampleCounts(world)
    again.load_state_dict(counts.regroup([counts.state_dict(), counts.state_dict()], BatchSplit(2, 1)))
    assert (again.skipped, again.truncated) == ({"no image": 4}, 6)


def test_recording_and_backtracking_use_cached_text(place, world):
    more = (*support.EPS, "precision=fp32", "record.steps=4", "gan.enabled=true", "backtrack.path=none")
    more = (
        *more,
        "backtrack.generator.lr=1e-3",
        "backtrack.fake_score.lr=1e-3",
        "backtrack.steps=4",
        "backtrack.fake_updates=2",
        "backtrack.loop.save_every=2",
    )
    found = {}
    for data in ("plain", "full"):
        here = run(place, world, f"all-{data}", data, *more)
        _, calls = trained(Recording, here, "record")
        assert (calls["text"] > 0) == (data == "plain") and not calls["vae"]
        found[data] = support.backtrack_weights(here)
    assert support.largest_difference(*found.values()) < 1e-5
    assert moved(place, found["full"], "generator") > 1e-4
    stopped = run(place, world, "stopped", "full", *more)
    assert support.backtrack_weights(stopped, signal_at=(2,)) is None
    resumed = support.backtrack_weights(stopped)
    assert all(torch.equal(resumed[key], value) for key, value in found["full"].items())


def test_another_cache_is_refused(place, world, tmp_path):
    def refusal(data="full", pipeline=None, *overrides) -> str:
        with pytest.raises((UserError, DataError)) as raised:
            Pretraining(run(place, world, "refused", data, *overrides), pipeline or place / "pipeline")
        return str(raised.value)

    assert "data.resolution=16" in refusal("full", None, "data.resolution=16")
    for part, named in (("vae", "another autoencoder"), ("text_encoder_2", "another text encoders")):
        other = tmp_path / part
        shutil.copytree(place / "pipeline", other)
        file = next((other / part).glob("*.safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        assert named in refusal("full", other)
    assert "not encoded" in refusal("plain", None, "data.cached=require")
    latents = tmp_path / "latents"
    assert encode(place / "plain", latents, place / "pipeline") == 0
    assert "no text states" in refusal(latents, None, "data.cached=require")
    assert "no image" in refusal("full", None, "data.cached=off")
    mixed = tmp_path / "mixed"
    shutil.copytree(place / "full", mixed)
    shutil.copy(place / "plain" / "s-000004.tar", mixed / "s-000009.tar")
    assert "mixes different kinds" in refusal(mixed) and "is not" in refusal(mixed)
    shutil.copy(latents / "s-000004.tar", mixed / "s-000009.tar")
    assert "differ in text" in refusal(mixed)


def test_damaged_tensors_are_rejected(place, tmp_path):
    index = load_index(place / "full" / "s-000000.tar")
    good = ShardDataset([index.tar], 8, ("caption", "text"))
    meta = good.read_text(0)["meta"]
    samples = [{"__key__": "a", "safetensors": b"nonsense", "txt": "a", "json": meta}]
    samples += [{"__key__": "b", "safetensors": good._read(1, "tensors"), "txt": "b", "json": meta}]
    samples += [{"__key__": "c", "safetensors": good._read(1, "tensors"), "txt": "c", "json": json.loads("{}")}]
    dataset = ShardDataset(write_shards(samples, tmp_path, "s"), 8, ("caption", "text"))
    assert {dataset[i]["key"] for i in range(3)} == {"b"}
    assert sum((Counter(dataset[i]["skipped"]) for i in range(3)), Counter()).keys() == {
        "damaged encoded tensors or record"
    }
