"""Sources of images: whose noise, which weights, which sampler."""

import shutil

import pytest
import support
import torch

from models.errors import ModelError
from models.sampler import ImageNoise
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.evaluation.protocols import PROTOCOLS, Sampling, resolve
from trainer.evaluation.sources import OpenPipeline, PipelineSource, find_source
from trainer.pretrain import Pretraining
from trainer.training.run import Run

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
SHAPE = (4, 8, 8)


def noise(kind: str, indices: list[int]) -> ImageNoise:
    return ImageNoise(3, indices, SHAPE, CPU, kind)


def test_noise_of_published_protocols():
    """DMD2 draws a batch of images from one generator, whatever our batches are; all draw later steps per image."""
    batches = [torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3 + i)) for i in range(2)]
    assert torch.equal(noise("batch-4", [1, 2, 6]).draw(), torch.stack([batches[0][1], batches[0][2], batches[1][2]]))
    plain = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    for kind in ("image", "device"):  # on a CPU they are the same
        assert torch.equal(noise(kind, [6]).draw()[0], plain)
    both = noise("batch-4", [6])
    both.draw()
    assert torch.equal(both.draw()[0], plain)


def test_a_pipeline_of_others_is_sampled_by_its_own_code(root):
    """As diffusers does it, one image at a time, with its scheduler: not by the run's sampler."""
    other = root / "others"
    shutil.copytree(root / "base" / "pipeline", other, dirs_exist_ok=True)
    (other / "disback.json").unlink(missing_ok=True)
    settings = support.tiny(root, "foreign", "sample.steps=2", "sample.guidance_scale=1.5")
    run = Run(settings, ALONE)
    source = find_source(run, str(other))
    assert isinstance(source, PipelineSource) and source.name == "others"
    opened = source.open(run)
    assert isinstance(opened, OpenPipeline)
    captions = support.PROMPTS
    made = opened.images(captions, 5, [0, 1, 2])
    pipe = support.plain(other)
    for i, caption in enumerate(captions):
        image = pipe(
            caption,
            num_inference_steps=2,
            guidance_scale=1.5,
            height=8,
            width=8,
            generator=support.generators(3)[i],
            output_type="pt",
        ).images[0]
        difference = (image.mul(255).to(torch.uint8).int() - made[i].int()).abs()
        assert int(difference.max()) <= 1
    drawn = source.open(run, Sampling("batch-4")).images(captions[:1], 5, [0])
    assert torch.equal(drawn, opened.images(captions[:1], 5, [0]))  # row 0 of seed 5


def test_more_steps_than_a_schedule_has(root):
    """Refused before an image is made, whichever code would make it."""
    other = root / "steps"
    shutil.copytree(root / "base" / "pipeline", other)
    (other / "disback.json").unlink()
    run = Run(support.tiny(root, "many", "sample.steps=2000"), ALONE)
    with pytest.raises(
        ModelError, match="sample.steps=2000: the pipeline's schedule has 1000 timesteps: set at most 1000"
    ):
        find_source(run, "teacher").open(run)
    with pytest.raises(UserError, match=f"sample.steps=2000: the scheduler of {other} cannot take them: .*1000"):
        find_source(run, str(other)).open(run)
    find_source(run, "start").open(run)  # a one-step generator ignores the setting
    with pytest.raises(ModelError, match="sample.steps=2000"):
        Pretraining(Run(support.tiny(root, "many", "sample.steps=2000", "pretrain.loop.sample_every=1"), ALONE), other)


def test_names(root):
    run = Run(support.tiny(root, "names"), ALONE)
    node = find_source(run, "node-0002")
    assert node.timesteps is None and node.weights == root / "base" / "path" / "node-0002"
    assert node.open(run).images(support.PROMPTS, 0, [0, 1, 2]).shape == (3, 3, 8, 8)
    for what in ("node-0009", "step-00000002-raw", "nothing"):
        with pytest.raises(UserError, match=f"'{what}' is not"):
            find_source(run, what)


def test_protocols_fix_what_changes_their_numbers():
    settings = support.load_settings(support.TINY, ["evaluate.protocol=dmd2-coco10k"])
    with pytest.raises(UserError, match=r"evaluate.features: protocol dmd2-coco10k fixes it"):
        resolve(settings.evaluate)  # the file sets it
    protocol = PROTOCOLS["dmd2-coco10k"]
    assert protocol.hash({}, images=10_000) == protocol.hash({}, images=10_000)
    hashes = {p.hash({}, images=10_000) for p in PROTOCOLS.values()}
    assert len(hashes) == len(PROTOCOLS)
    assert protocol.hash({"inception": "x"}) != protocol.hash({}) and protocol.hash({}, images=5) != protocol.hash({})


def test_the_first_tokenizer_for_both_encoders(root):
    """DMD2's evaluation pads the second encoder's captions as the first one's."""
    run = Run(support.tiny(root, "tokenizer"), ALONE)
    plain, dmd2 = (find_source(run, "start").open(run, Sampling(one_tokenizer=flag)) for flag in (False, True))
    assert plain.sampler.text.parts.tokenizer_2.pad_token != plain.sampler.text.parts.tokenizer.pad_token
    assert dmd2.sampler.text.parts.tokenizer_2 is dmd2.sampler.text.parts.tokenizer
    states = [each.sampler.text.encode(support.PROMPTS, (8, 8)).states for each in (plain, dmd2)]
    assert not torch.equal(*states)
