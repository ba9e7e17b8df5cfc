"""Scenarios for several processes; started by torchrun from the tests. Usage: ranks.py SCENARIO ROOT."""

import dataclasses
import json
import os
import resource
import signal
import sys
from pathlib import Path

import support
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel

from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from models.conditioning import Conditioning
from models.networks import predict
from models.pipeline import WEIGHTS_FILE, empty_network, load_network
from trainer.distributed import barrier, finish, start
from trainer.engines import Role, deepspeed_config
from trainer.errors import Stopped, UserError
from trainer.loop import train
from trainer.pretrain import Pretraining
from trainer.quiet import no_progress_bars
from trainer.record import Recording, record
from trainer.run import Run
from trainer.target import ReadAhead


def parity(root, world):
    """Backtracking at every ZeRO stage, with two ranks and recomputed activations; the weights go to root/parity/."""
    for stage in ("zero0", "zero1", "zero2", "zero3", support.sharded_zero3(root / "parity")):
        label = Path(stage).stem
        flags = (*support.PARITY, *support.zero(stage), "network.checkpointing=true")
        run = support.single(root, f"parity-{label}", world, *flags)
        support.save(support.backtrack_weights(run), root / "parity" / f"{label}.pt", world)


def resume(root, world):
    """At ZeRO 2 and 3: a whole run, and one that is stopped twice, by a signal to one rank only."""
    for stage in ("zero2", support.sharded_zero3(root / "resume")):
        label, flags = Path(stage).stem, support.zero(stage)
        whole = support.backtrack_weights(support.single(root, f"whole-{label}", world, *flags))
        support.save(whole, root / "resume" / f"whole-{label}.pt", world)
        run = support.single(root, f"parts-{label}", world, *flags)
        assert support.backtrack_weights(run, signal_at=(3,), signal_rank=1) is None
        assert support.backtrack_weights(run, signal_at=(6,), signal_rank=0) is None
        support.save(support.backtrack_weights(run), root / "resume" / f"parts-{label}.pt", world)


def poison(root, world):
    """A gradient that is not finite, on one rank of two."""
    from test_health import poisoned

    for stage in ("zero0", "zero2"):
        run = support.single(root, f"poison-{stage}", world, *support.zero(stage), "backtrack.steps=4")
        support.save(poisoned(run, (1,), rank=1), root / "poison" / f"{stage}.pt", world)


def gan(root, world):
    """Backtracking with the GAN term: shared passes and passes of its own."""
    from test_gan import GAN_STAGES, gan_flags

    sharded = support.sharded_zero3(root / "gan")
    for shared, labels in GAN_STAGES.items():
        for label in labels:
            stage = sharded if label == "sharded" else label
            run = support.single(root, f"gan-{label}-{shared}", world, *gan_flags(shared), *support.zero(stage))
            support.save(support.backtrack_weights(run), root / "gan" / f"{label}-{shared}.pt", world)


def recording(root, world):
    """Stage 1 with two ranks at sharded ZeRO-3."""
    stage = support.sharded_zero3(root / "recording")
    flags = (f"record.ds_config={stage}", f"record.teacher_ds_config={stage}", f"path={root / 'recording' / 'two'}")
    record(Run(support.tiny(root, "recording-two", *support.RECORDING, *flags), world))


def lora(root, world):
    """LoRA with two ranks and the GAN term: stage 2 at ZeRO 1, and at ZeRO 3 where it is stopped and resumed."""
    for name, signal_at in (("zero1", ()), (support.sharded_zero3(root / "lora"), (2,))):
        label, flags = Path(name).stem, (*support.LORA_GAN, f"path={root / 'lora-base' / 'path'}", *support.zero(name))
        run = support.single(root, f"lora-two-{label}", world, *flags)
        for at in signal_at:
            assert support.backtrack_weights(run, signal_at=(at,), signal_rank=1) is None
        support.save(support.backtrack_weights(run), root / "lora" / f"{label}.pt", world)


def four(root, world):
    """Four ranks as two nodes of two: backtracking at ZeRO 1, and at ZeRO 3 with a teacher sharded within each node."""
    world = dataclasses.replace(world, local_rank=world.rank % 2)
    within = root / "four" / "within.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    within.write_text(json.dumps({"shard_within_node": True, "zero_optimization": zero}))
    barrier(world)
    for stage in ("zero1", support.sharded_zero3(root / "four")):
        label = Path(stage).stem
        flags = (*support.PARITY, *support.zero(stage), f"backtrack.teacher_ds_config={within}")
        run = support.single(root, f"four-{label}", world, *flags)
        support.save(support.backtrack_weights(run), root / "four" / f"{label}.pt", world)
    folder = root / "base" / "pipeline" / "unet"
    config = deepspeed_config("teacher_node", 1, 1, 0.0, "fp32", world)
    teacher = Role("teacher", empty_network(folder), config, world, folder=folder)
    for s in teacher.weights.slices:
        assert s.size == 2 and s.end - s.start <= s.piece == -(-s.numel // 2)
        assert dist.get_process_group_ranks(s.group) == [world.rank // 2 * 2, world.rank // 2 * 2 + 1]


def switches(root, world):
    """A hundred target switches of a teacher that is sharded in part: what is gathered at the time of a switch must not
    survive it."""
    path, teacher = root / "base" / "path", root / "base" / "pipeline" / "unet"
    folders = [teacher, *(path / f"node-{i:04d}" for i in (1, 2, 3))]
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([10, 700])
    cond = Conditioning(
        torch.randn(2, 16, 16, generator=generator), torch.randn(2, 16, generator=generator), torch.ones(2, 6)
    )
    with torch.no_grad():
        expected = [predict(load_network(folder).eval(), x, t, cond) for folder in folders]
    for threshold in (0, 20, 300, 10**9):
        file = root / "switches" / f"threshold-{threshold}.json"
        zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
        file.write_text(json.dumps({"zero_optimization": zero}))
        config = deepspeed_config(str(file), 2, 1, 0.0, "fp32", world)
        role = Role("teacher", empty_network(teacher), config, world, folder=teacher)
        reader = ReadAhead(role.weights, world.device)
        for step in range(25):
            node = step % 4
            role.weights.write(reader.take(folders[node]))
            reader.written()
            reader.begin(folders[(step + (1 if step % 3 else 2)) % 4])  # right two times of three
            for _ in range(step % 3):
                with torch.no_grad():
                    assert torch.allclose(predict(role, x, t, cond), expected[node], atol=1e-6), (threshold, step)
        reader.close()


def loading(root, world):
    """A network of 300 MB is loaded at ZeRO-3: the host memory of each of two ranks grows by half of it and a little."""
    folder, small = root / "loading" / "unet", root / "loading" / "small"
    if world.main:
        heads = {"attention_head_dim": 8, "cross_attention_dim": 64, "norm_num_groups": 8}
        for channels, out in (((96, 192, 384, 384), folder), ((8, 8, 8, 8), small)):
            UNet2DConditionModel(sample_size=8, block_out_channels=channels, **heads).save_pretrained(out)
    barrier(world)
    config = deepspeed_config(support.sharded_zero3(root / "loading"), 1, 1, 0.0, "fp32", world)
    Role("teacher", empty_network(small), config, world, folder=small)  # what libraries take at their first use
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert size > 200e6
    before = resident_bytes()
    reset_peak()
    role = Role("teacher", empty_network(folder), config, world, folder=folder)
    growth = (peak_bytes() - before) / size
    assert sum(t.numel() for t in role.local()) * 4 < 0.51 * size
    assert growth < 0.75, growth
    before = resident_bytes()
    reset_peak()
    whole = load_network(folder)
    assert all(p.isfinite().all() for p in whole.parameters())  # only what is used is read from a mapped file
    assert (peak_bytes() - before) / size > 0.9  # the measure sees what is held


def elastic_flags(root, stage):
    """Overrides of the runs that change their number of processes: momentum, and samples that are used again."""
    folder = root / "elastic-stages"
    folder.mkdir(exist_ok=True)
    stage = support.sharded_zero3(folder) if stage == "sharded" else stage
    betas = [f"backtrack.{role}.betas=[0.9, 0.999]" for role in ("generator", "fake_score")]
    loop = (
        "backtrack.reuse_x0=true",
        "backtrack.loop.log_every=4",
        "backtrack.loop.sample_every=0",
        "backtrack.loop.keep_last=9",
    )
    return [*support.PARITY, *loop, *betas, *support.zero(stage)]


class ReadingRun(Run):
    """Writes down the positions that this rank reads."""

    def dataset(self, split, want):
        return ReadingDataset(
            super().dataset(split, want), self.folder / f"read-{self.world.size}-{self.world.rank}.txt"
        )


class ReadingDataset:
    def __init__(self, dataset, file):
        self.dataset, self.file, self.rejected, self.close = dataset, file, dataset.rejected, dataset.close

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, position):
        with self.file.open("a") as handle:
            handle.write(f"{position}\n")
        return self.dataset[position]


def elastic_run(root, name, world, stage, *flags):
    flags = (*elastic_flags(root, stage), *flags)
    kind = ReadingRun if name == "there-and-back" else Run
    return kind(support.tiny(root, name, *flags), world)


def stop_training(root, name, world, stage, at, *flags):
    """Backtracking up to step `at`: ranks that agree on a signal stop a step later, one process at once."""
    run = elastic_run(root, name, world, stage, *flags)
    assert support.backtrack_weights(run, signal_at=(at if world.size == 1 else at - 1,)) is None
    assert (run.folder / "backtrack" / "LATEST").read_text() == f"step-{at:08d}\n"
    return run


class Signalled:
    """A stage that is sent a signal in the middle of a step."""

    stop_at = 0

    def update(self, step, meters, until_log):
        if step + 1 == self.stop_at and self.world.main:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().update(step, meters, until_log)


class SignalledRecording(Signalled, Recording):
    pass


class SignalledPretraining(Signalled, Pretraining):
    pass


def _stop(stage, at):
    """Runs a stage up to step `at`, where it must stop."""
    run, world = stage.run, stage.world
    stage.stop_at = at if world.size == 1 else at - 1
    try:
        train(stage, stage.settings.loop, run.settings.health, run.stage_folder(stage.name), world)
    except Stopped:
        return
    raise AssertionError("it was not stopped")


def stop_recording(root, name, world, flags, at):
    run = Run(support.tiny(root, name, *flags), world)
    run.stage_folder("record")
    _stop(SignalledRecording(run), at)


def pretraining(root, name, world):
    start = root / "base" / "pipeline"
    flags = (f"pretrain.start={start}", "pretrain.ema=0.5", "pretrain.optimizer={lr: 1e-3, eps: 1e-4}")
    run = Run(support.tiny(root, name, *flags), world)
    run.stage_folder("pretrain")
    return SignalledPretraining(run, start)


def elastic_save(root, world):
    """Saves by two ranks in the middle of everything."""
    for stage in ("zero0", "zero1", "zero2", "sharded"):
        stop_training(root, f"two-{stage}", world, stage, 3)
    stop_training(root, "two-bf16", world, "sharded", 3, "precision=bf16")
    stop_training(root, "there-and-back", world, "zero2", 3)
    flags = (*support.RECORDING, "record.probe=7", f"path={root / 'elastic_save' / 'parts'}")
    stop_recording(root, "recording-parts", world, flags, 5)
    _stop(pretraining(root, "pretraining-parts", world), 5)


def elastic_load(root, world):
    """Goes on, with two ranks, with what one process saved."""
    for name in ("one-zero0", "one-zero1", "one-zero2", "one-sharded", "there-and-back"):
        run = elastic_run(root, name, world, name.removeprefix("one-") if name.startswith("one-") else "zero2")
        support.save(support.backtrack_weights(run), root / "elastic_load" / f"{name}.pt", world)


class Limited(support.Interrupted):
    """Rank 1 may write no large file from step 2 on."""

    def update(self, step, meters, until_log):
        if step == 1 and self.world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return super().update(step, meters, until_log)


def limited(root, world):
    """A save that one rank of two cannot finish, and the run that goes on behind it."""
    out = root / "limited"
    loop = ("backtrack.steps=4", "backtrack.loop.save_every=1", "backtrack.loop.sample_every=0")
    for stage in ("zero1", "sharded"):
        config = support.sharded_zero3(out) if stage == "sharded" else stage
        flags = (*loop, *support.zero(config))
        support.save(
            support.backtrack_weights(support.single(root, f"unlimited-{stage}", world, *flags)),
            out / f"whole-{stage}.pt",
            world,
        )
        run, told = support.single(root, f"limited-{stage}", world, *flags), [None, None]
        try:
            support.backtrack_weights(run, Limited)
        except UserError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            dist.all_gather_object(told, str(error))
        names = [p.name for p in (run.folder / "backtrack" / "checkpoints").iterdir()]
        assert names == ["step-00000001"], names
        if world.main:
            (out / f"told-{stage}.json").write_text(json.dumps(told))
        barrier(world)
        support.save(support.backtrack_weights(run), out / f"limited-{stage}.pt", world)


if __name__ == "__main__":
    no_progress_bars()
    everyone = start()
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    if everyone.main:
        (folder / scenario).mkdir(exist_ok=True)
    barrier(everyone)
    globals()[scenario](folder, everyone)
    finish()
