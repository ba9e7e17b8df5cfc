"""What a training step does: how often each network runs, how much work that is, and that nothing waits for the device."""

import os
from collections import Counter
from contextlib import contextmanager

import pytest
import support
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.flop_counter import FlopCounterMode

import trainer.pretrain
import trainer.training.gan_term
from benchmarks.device_waits import Counts, asynchronous, count_cycle
from models.compile import set_deterministic
from models.noise import Draws
from models.pipeline import load_network
from models.profile import count_flops, pass_flops
from trainer.backtrack import Backtracking
from trainer.planner.flops import backtrack_flops, pretrain_flops, record_flops
from trainer.pretrain import Pretraining
from trainer.record import Recording
from trainer.training.run import Run

UPDATES, BATCH = 3, 4
PLAIN = ("backtrack.path=none", f"backtrack.fake_updates={UPDATES}", "backtrack.steps=6")


@contextmanager
def warmed_up(make, shards, pipeline, world, *overrides):
    """A real stage after its first cycle."""
    with started(make, shards, pipeline, world, *overrides) as stage:
        for step in range(UPDATES):
            stage.update(step)
        yield stage


@contextmanager
def started(make, shards, pipeline, world, *overrides):
    batch = [f"{stage}.batch={BATCH}" for stage in ("pretrain", "record", "backtrack")]
    places = f"pipeline={pipeline}", f"path={shards / 'calls' / 'path'}"
    settings = support.tiny(shards, "calls", *places, *PLAIN, *batch, *overrides)
    run = Run(settings, world)
    stage = make(run)
    try:
        stage.begin(0)
        yield stage
    finally:
        stage.close()


SECOND_CYCLE = range(UPDATES, 2 * UPDATES)


@pytest.mark.parametrize(
    ("reuse", "guidance", "doubled", "accumulation"),
    [(True, 8.0, True, 1), (False, 8.0, True, 2), (True, 1.0, True, 2), (True, 8.0, False, 2)],
)
def test_networks_run_as_often_as_they_must(shards, pipeline, world, reuse, guidance, doubled, accumulation):
    options = (f"backtrack.reuse_x0={reuse}", f"backtrack.guidance_scale={guidance}")
    options += (f"backtrack.guidance_batch={doubled}", f"backtrack.accumulation={accumulation}")
    calls = Counter()
    with warmed_up(Backtracking, shards, pipeline, world, *options) as stage:
        for name, role in stage.roles.items():

            def count(module, args, out, name=name):
                calls[name, "grad" if torch.is_grad_enabled() and out[0].requires_grad else "no grad"] += 1
                calls[name, "samples"] += len(args[0])

            role.module.register_forward_hook(count)
        stage.sampler.text.parts.text_encoder.register_forward_hook(lambda *_: calls.update(["text"]))
        read = stage.dataset.read
        stage.dataset.read = lambda *row: calls.update(["rows read"]) or read(*row)
        for step in SECOND_CYCLE:
            stage.update(step)
    fresh = 0 if reuse else UPDATES - 1  # fake updates that make samples of their own
    assert calls["generator", "grad"] == accumulation
    assert calls["generator", "no grad"] == fresh * accumulation
    assert calls["generator", "samples"] == (1 + fresh) * BATCH
    assert calls["teacher", "grad"] == 0 and calls["teacher", "no grad"] == accumulation * (1 if doubled else 2)
    assert calls["teacher", "samples"] == BATCH * (1 if guidance == 1 else 2)
    assert calls["fake_score", "grad"] == UPDATES * accumulation
    assert calls["fake_score", "no grad"] == accumulation
    assert calls["text"] == (1 + fresh) * accumulation
    assert calls["rows read"] == (1 + fresh) * BATCH


GAN, STEPS = "gan.enabled=true", "backtrack.student_timesteps=[399,199]"


@pytest.mark.parametrize(
    ("make", "formula", "options"),
    [
        (Backtracking, backtrack_flops, ()),
        (Backtracking, backtrack_flops, ("backtrack.guidance_scale=1", "backtrack.reuse_x0=true")),
        (Backtracking, backtrack_flops, (GAN, "network.checkpointing=true", "backtrack.generator_split=2")),
        (Backtracking, backtrack_flops, (GAN, "gan.shared_pass=false", "backtrack.accumulation=2")),
        (Backtracking, backtrack_flops, (GAN, "lora.rank=4", STEPS)),
        (Recording, record_flops, ("lora.rank=4", STEPS)),
        (Pretraining, pretrain_flops, ()),
    ],
)
def test_counted_work_is_what_a_step_executes(shards, pipeline, world, monkeypatch, make, formula, options):
    """FLOP of the metrics and of the plan, against a counter of the operators that a cycle of the real stage executes. Text
    encoders and autoencoder, whose work is not counted, are subtracted."""
    build = (lambda run: Pretraining(run, pipeline)) if make is Pretraining else make
    ignored = []

    def aside(call):
        def counted(*args, **kwargs):
            with FlopCounterMode(display=False) as counter:
                out = call(*args, **kwargs)
            ignored.append(counter.get_total_flops())
            return out

        return counted

    for module in (trainer.pretrain, trainer.training.gan_term):
        monkeypatch.setattr(module, "batch_latents", aside(module.batch_latents))
    updates = 2
    # Of a CPU's attention the counter knows the plain one only. Probes of recording are not counted.
    fixed = f"backtrack.fake_updates={updates}", "network.attention=math", "record.probe_every=100", "record.steps=100"
    with started(build, shards, pipeline, world, *options, *fixed) as stage:
        monkeypatch.setattr(stage, "encode", aside(stage.encode))
        settings, steps = stage.run.settings, len(stage.run.settings.student_timesteps)
        executed = 0.0
        for k in range(steps):  # each of the generator's steps is drawn in one cycle
            monkeypatch.setattr(Draws, "integer", lambda self, stream, count, k=k: k)
            executed += count_flops(lambda: [stage.update(step) for step in range(updates)])
    per_sample = (executed - sum(ignored)) / (steps * updates * BATCH)
    network = next(iter(stage.roles.values()))
    shape, tokens = stage.sampler.latent_shape, stage.sampler.text.tokens
    lora = {"lora": settings.lora} if make is not Pretraining else {}
    cost = pass_flops(network.config, shape, tokens, settings.gan.enabled and make is Backtracking, **lora)
    assert stage.flops == formula(settings, cost) * BATCH  # MFU leaves recomputation out
    counted = formula(settings, cost, recompute=settings.network.checkpointing)
    # Nobody computes the gradients of the inputs of first layers, and what of this tiny network is not checkpointed
    # (embeddings, first and last layer) is a good share of it; of SDXL it is not, see test_plan.
    low = 0.9 if settings.network.checkpointing else 0.965
    assert low < per_sample / counted < 1.005


# Operations that PyTorch documents as without a deterministic algorithm on a GPU (torch.use_deterministic_algorithms), of those
# that networks could use.
UNDETERMINED = {
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_linear1d_backward", "upsample_trilinear3d_backward", "reflection_pad2d_backward", "nll_loss_forward",
    "put_", "histc", "bincount", "median", "grid_sampler_2d_backward", "cumsum",
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "options", "waits", "reads"),
    [
        ("zero0", ("precision=fp32",), 0, 0),
        ("zero0", (GAN, "precision=bf16", "network.checkpointing=true", "network.deterministic=true"), 0, 0),
        ("zero1", ("precision=bf16",), 2, 2),
        ("zero2", (GAN, "precision=bf16"), 2, 2),
        ("zero3", ("precision=bf16",), 0, 2),
    ],
)
def test_what_a_cycle_waits_for(shards, pipeline, world, stage, options, waits, reads):
    """A GPU would be waited for nowhere but in DeepSpeed's two updates, above ZeRO-0: once for the streams of `overlap_comm` at
    ZeRO-1 and 2, and once for the gradient norm. (ZeRO-3 also reads wherever calls come in another order than before.) An
    update has no kernel per parameter but the norm's two."""
    flags = (*PLAIN, "backtrack.fake_updates=1", "backtrack.steps=9", f"backtrack.batch={BATCH}", "backtrack.ema=0.9")
    run = Run(support.tiny(shards, "waits", f"pipeline={pipeline}", *flags, *support.zero(stage), *options), world)
    try:
        cycle, updates = count_cycle(run)
    finally:
        set_deterministic(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert not cycle.ours
    assert sum(count for place, count in cycle.waits.items() if place.startswith("device")) == waits, cycle.waits
    read = (updates if stage == "zero3" else cycle).reads
    assert read.total() == reads, read
    parameters = len(list(load_network(pipeline / "unet").parameters()))
    assert updates.operations.total() / 2 < 2 * parameters + 70, updates.operations.most_common(10)
    executed = {name.partition("::")[2].partition(".")[0] for name in cycle.operations}
    assert not executed & UNDETERMINED and "convolution_backward" in executed


def test_reads_and_waits_are_seen():
    x = torch.ones(2)
    with Counts() as counts, asynchronous(counts):
        if x.sum() > 1 and float(x[0]) and x.tolist():
            x[0].item()
        get_accelerator().synchronize()
        get_accelerator().Stream().synchronize()
    get_accelerator().synchronize()
    assert counts.reads.total() == 4 and counts.waits.total() == 2 and counts.ours.total() == 6
