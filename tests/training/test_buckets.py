"""Training in aspect-ratio buckets: both stages, on one and two ranks, resumed, from images and from latents; what it is
conditioned on, and what is shown and scored."""

import json

import pytest
import ranks_buckets
import support
import torch
from ranks_buckets import BUCKETS, KINDS, recorded, run_in_buckets
from torchvision.io import read_image

from data.loader import Batches
from data.sampling_order import BatchSplit
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand
from models.architecture import find_architecture
from models.errors import ModelError
from models.sampler import ImageNoise
from trainer import shards as command
from trainer.backtrack import Backtracking
from trainer.encode import Encoding
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.planner.stages import BacktrackPlan
from trainer.pretrain import Pretraining
from trainer.training.loop import train


@pytest.fixture(scope="module")
def root(shards):
    ranks_buckets.build(shards)
    return shards


def encode(root, out, *more) -> int:
    place = root / "in-buckets"
    call = [
        "--encode",
        f"{place / 'images'}",
        "--out",
        f"{out}",
        "--pipeline",
        f"{place}/pipeline",
        "--resolution",
        "8",
    ]
    return command.main([*call, "--buckets", "8x8,8x16,16x8", "--precision", "fp32", *more])


def test_two_ranks_train_as_one_and_resume(root, world):
    support.ranks("buckets", root)
    one = recorded(run_in_buckets(root, "one-record", world))
    assert support.largest_difference(one, torch.load(root / "buckets" / "record.pt")) < 1e-5
    for kind, flags in KINDS.items():
        run = run_in_buckets(root, f"one-{kind}", world, *flags)
        whole = support.backtrack_weights(run)
        assert support.largest_difference(whole, torch.load(root / "buckets" / f"{kind}.pt")) < 2e-5, kind
        lines, others = (support.metrics(root / f"in-buckets-{n}-{kind}" / "backtrack") for n in ("one", "two"))
        losses = [[line["loss/fake_score"] for line in run] for run in (lines, others)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_has_the_same_bits(root, world):
    flags = (*KINDS["reuse"], "data.filters=['score < 0.9']")
    whole = support.backtrack_weights(run_in_buckets(root, "whole", world, *flags))
    parts = run_in_buckets(root, "parts", world, *flags)
    assert support.backtrack_weights(parts, signal_at=(3,)) is None
    again = support.backtrack_weights(parts)
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    with pytest.raises(UserError, match=r"data.filters was \['score < 0.9'\], is now \['score < 0.5'\]"):
        support.backtrack_weights(run_in_buckets(root, "parts", world, *KINDS["reuse"], "data.filters=['score < 0.5']"))


def test_noise_and_time_ids_are_those_of_the_bucket(root, world):
    run = run_in_buckets(root, "look", world, *KINDS["plain"])
    stage, seen = Backtracking(run), []
    stage.generator.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[2:], kwargs["added_cond_kwargs"]["time_ids"])),
        with_kwargs=True,
    )
    stage.begin(0)
    shapes = set()
    for step in range(0, 8, 2):
        stage.update(step)
        stage.batches._step, stage.batches._part = step + 2, 0
    for shape, time_ids in seen:
        height, width = (2 * side for side in shape)
        assert (time_ids == torch.tensor([height, width, 0, 0, height, width])).all()
        shapes.add((height, width))
    stage.close()
    assert shapes <= set(BUCKETS) and len(shapes) > 1


def test_pretraining_is_conditioned_on_each_image(root, world):
    run = run_in_buckets(root, "sizes", world, "data.crop=random", "data.flip=true")
    stage, seen = Pretraining(run, root / "in-buckets" / "pipeline"), []
    stage.teacher.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    stage.begin(0)
    stage.update(0)
    stage.close()
    batch = next(Batches(run.dataset("train", ("image", "caption"), 8), BatchSplit(1, 8), 0))
    target = torch.tensor([batch.size] * 8)
    assert torch.equal(seen[0], torch.cat([batch.original_sizes, batch.crops, target], 1).float())
    assert {tuple(size) for size in batch.original_sizes.tolist()} != {batch.size}


def test_training_from_latents_is_training_from_images(root, world):
    place = root / "in-buckets"
    assert encode(root, place / "latents", "--text") == 0
    flags = ("pretrain.optimizer.eps=1e-4", "pretrain.steps=6", "pretrain.optimizer.warmup=0")
    found = []
    for data in ("images", "latents"):
        run = run_in_buckets(root, f"pretrain-{data}", world, *flags, data=data)
        stage = Pretraining(run, place / "pipeline")
        train(stage, run.settings.pretrain.loop, run.settings.health, run.stage_folder("pretrain"), world)
        found.append(stage.teacher.state_dict())
    assert support.largest_difference(*found) < 1e-5


def test_encoding_is_resumed_and_refuses_other_buckets(root, world, tmp_path, capsys, monkeypatch):
    options = ("--filter", "score >= 0.1", "--text", "--caption-field", "txt:1,blip:2", "--batch", "3")
    assert encode(root, tmp_path / "whole", *options) == 0
    assert "not score >= 0.1" in capsys.readouterr().out

    def killed(*args, **kwargs):
        done.append(1)
        if len(done) > 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    done, real = [], Encoding.tensors
    with monkeypatch.context() as patch:
        patch.setattr("trainer.encode.Encoding.tensors", killed)
        assert encode(root, tmp_path / "parts", *options) != 0
    finished = {tar.name for tar in (tmp_path / "parts").glob("*.tar")}
    assert 0 < len(finished) < 3
    for job in ("1/2", "0/2"):
        assert encode(root, tmp_path / "parts", *options, "--job", job) == 0
    for tar in (tmp_path / "whole").glob("*.tar"):
        assert (tmp_path / "parts" / tar.name).read_bytes() == tar.read_bytes()
    assert encode(root, tmp_path / "whole", "--text") == 2
    assert "another captions, filters" in capsys.readouterr().err
    several = ShardDataset(
        expand(f"{tmp_path / 'whole'}"), 8, ("caption", "latents", "text"), caption_field={"txt": 1, "blip": 2},
        selection=run_in_buckets(root, "x", world).settings.data.selection, batch=4,
    )  # fmt: skip
    captions = {}
    for position in range(120):
        sample = several[position]
        latents = sample["cached"]["latent_mean"].shape[1:]
        assert tuple(2 * side for side in latents) == sample["size"]
        captions.setdefault(sample["caption"].split()[0], sample["cached"]["states"])
    assert captions.keys() == {"image", "picture"} and not torch.equal(*captions.values())
    for flags, message in (
        (["data.buckets=[[8, 8]]"], "have the buckets"),
        (["data.buckets=[]"], "but data.buckets is empty"),
        (["data.flip=true"], "data.flip=true change images"),
    ):
        with pytest.raises(UserError, match=message):
            Pretraining(
                run_in_buckets(root, "refused", world, *flags, data=tmp_path / "whole"),
                root / "in-buckets" / "pipeline",
            )


def test_sides_must_fit_the_pipeline(root, world):
    with pytest.raises(ModelError, match=r"data.buckets: \[8, 9\] is not a multiple of 2 pixels .* use \[8, 8\]"):
        run = run_in_buckets(root, "odd", world, "data.buckets=[[8, 8], [8, 9]]")
        _ = run.pipeline_folder


def test_previews_show_every_bucket(root, world):
    run = run_in_buckets(root, "preview", world, *KINDS["plain"], "sample.enlarge=1", "sample.prompts=[]")
    stage, made = Backtracking(run), []

    def make(captions, noise: ImageNoise):
        made.append((noise.shape[1:], captions))
        return torch.zeros(len(captions), 3, *(2 * side for side in noise.shape[1:]), dtype=torch.uint8)

    assert stage.grid(make).shape == (3, 4 * 18 + 2, 8 * 18 + 2)  # four rows of eight, 16 x 16 pixels each
    assert {shape for shape, _ in made} == {(4, 4), (4, 8), (8, 4)}
    wide = {n for n in range(42) if ranks_buckets.SIZES[n % 7] in ((24, 10), (20, 8), (12, 8))}
    assert {int(c.split()[1]) for shape, captions in made if shape == (4, 8) for c in captions} <= wide
    assert stage.preview().shape[0] == 3
    stage.close()


def test_evaluation_follows_the_prompts_buckets(root, world, tmp_path):
    flags = [*support.tiny_clip(root / "clip"), "evaluate.what=start", "evaluate.images=42", "evaluate.keep=folder"]
    run = run_in_buckets(
        root, "scored", world, *flags, "evaluate.few_images=true", "evaluate.metrics=[kid, clip_score]"
    )
    evaluate(run)
    dataset = run.dataset("heldout", ("image", "caption"))
    images = sorted((run.folder / "eval").glob("*-images/*.png"))
    assert len(images) == 42
    for row, file in enumerate(images):
        assert tuple(read_image(str(file)).shape[1:]) == dataset.size(row)
    assert json.loads(next((run.folder / "eval").glob("start/metrics.json")).read_text())["kid"] is not None
    with pytest.raises(UserError, match="data.buckets: pixel_fd"):
        evaluate(run_in_buckets(root, "scored-2", world, *flags, "evaluate.metrics=[pixel_fd]"))


def test_the_plan_is_for_the_largest_bucket(root, world):
    sizes = {}
    for name, flags in (("square", ("data.buckets=[]",)), ("all", ()), ("wide", ("data.buckets=[[8, 16]]",))):
        run = run_in_buckets(root, name, world, *flags)
        plan = BacktrackPlan(run.settings, find_architecture(f"{root}/in-buckets/pipeline"), 1)
        sizes[name] = plan.flops
    assert sizes["square"] < sizes["all"] == sizes["wide"]
