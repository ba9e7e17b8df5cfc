"""Scenarios for several processes; started by torchrun from the tests. Usage: ranks.py SCENARIO ROOT."""

import dataclasses
import sys
from pathlib import Path

import support
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from ranks_elastic import elastic_load, elastic_save, limited  # noqa: F401 (found by name)

from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from models.conditioning import Conditioning
from models.denoise import predict
from models.pipeline import WEIGHTS_FILE, empty_network, load_network
from trainer.config.deepspeed import deepspeed_config
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import barrier, finish, start
from trainer.engine.role import Role
from trainer.path.target import ReadAhead
from trainer.record import record
from trainer.training.run import Run


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
    """LoRA with two ranks and the GAN term at sharded ZeRO-3, stopped and resumed."""
    run = support.single(root, "lora-two", world, *support.lora_gan(root, support.sharded_zero3(root / "lora")))
    assert support.backtrack_weights(run, signal_at=(2,), signal_rank=1) is None
    support.save(support.backtrack_weights(run), root / "lora" / "sharded.pt", world)


def everything(root, world):
    """Adapters, GAN term, recomputed activations, accumulation and clipping at once, at every ZeRO stage; four ranks are
    two nodes of two, and at ZeRO 3 the teacher is sharded within each."""
    out, two_nodes = root / "everything", world.size == 4
    world = dataclasses.replace(world, local_rank=world.rank % 2)
    within = support.zero3_config(out / "within.json", shard_within_node=True)
    for stage in (*support.STAGES[:-1], support.sharded_zero3(out)):
        label, flags = f"{Path(stage).stem}-{world.size}", support.everything(root, stage)
        if two_nodes and stage not in support.STAGES:
            flags += (f"backtrack.teacher_ds_config={within}",)
        run = support.single(root, f"everything-{label}", world, *flags)
        support.save(support.backtrack_weights(run), out / f"{label}.pt", world)
    if not two_nodes:
        return
    folder = root / "base" / "pipeline" / "unet"
    config = deepspeed_config("teacher_node", 1, 1, 0.0, "fp32", world.size)
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
        file = support.zero3_config(root / "switches" / f"threshold-{threshold}.json", threshold)
        config = deepspeed_config(file, 2, 1, 0.0, "fp32", world.size)
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
    config = deepspeed_config(support.sharded_zero3(root / "loading"), 1, 1, 0.0, "fp32", world.size)
    Role("teacher", empty_network(small), config, world, folder=small)  # what libraries take at their first use
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert size > 200e6
    before = resident_bytes()
    reset_peak()
    role = Role("teacher", empty_network(folder), config, world, folder=folder)
    growth = (peak_bytes() - before) / size
    assert sum(t.numel() for t in role.local()) * 4 < 0.51 * size
    assert growth < 0.62, growth
    before = resident_bytes()
    reset_peak()
    whole = load_network(folder)
    assert all(p.isfinite().all() for p in whole.parameters())  # only what is used is read from a mapped file
    assert (peak_bytes() - before) / size > 0.9  # the measure sees what is held


if __name__ == "__main__":
    no_progress_bars()
    everyone = start()
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    if everyone.main:
        (folder / scenario).mkdir(exist_ok=True)
    barrier(everyone)
    globals()[scenario](folder, everyone)
    finish()
