"""Scenarios for several ranks. `ranks.py SCENARIO ROOT` runs one; `ranks.py` reads more lines of this kind from stdin and
answers "done" to each (support.ranks)."""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import sys
from pathlib import Path

import support
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from ranks_average import average  # noqa: F401 (found by name)
from ranks_buckets import buckets  # noqa: F401 (found by name)
from ranks_elastic import elastic_load, elastic_save, write_failure  # noqa: F401 (found by name)
from ranks_traffic import traffic  # noqa: F401 (found by name)

from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from models.files import WEIGHTS_FILE
from models.pipeline import empty_network, load_network
from trainer.backtrack import backtrack
from trainer.config.deepspeed import deepspeed_config
from trainer.config.load import load_settings
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import World, barrier, finish, gather_objects, start
from trainer.engine.role import Role
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.evaluation.job import Evaluation
from trainer.evaluation.networks import Networks
from trainer.evaluation.results_folder import ResultsFolder
from trainer.evaluation.sources import find_source
from trainer.path.target import ReadAhead
from trainer.record import record
from trainer.training.run import Run

LINEAR = torch.nn.functional.linear


def parity(root, world):
    """Backtracking with two ranks, recomputed activations and previews; the weights go to root/parity/."""
    mixed = support.zero3_config(root / "parity" / "mixed.json", threshold=100)  # elements: half of the parameters
    for stage in ("zero0", "zero2", mixed):
        label = Path(stage).stem
        flags = (*support.PARITY, "backtrack.steps=6", "backtrack.loop.sample_every=6", "network.checkpointing=true")
        run = support.single(root, f"parity-{label}", world, *flags, *support.zero(stage))
        support.save(support.backtrack_weights(run), root / "parity" / f"{label}.pt", world)


def resume(root, world):
    """At ZeRO 2 and 3: a whole run, and one that a signal to rank 1 stops and that is started again; at ZeRO 2 it first ends
    once more because rank 1 cannot write its files."""
    out, loop = root / "resume", ("backtrack.loop.save_every=1", "backtrack.steps=4")
    for stage in ("zero2", support.sharded_zero3(out)):
        label, flags = Path(stage).stem, (*loop, *support.zero(stage))
        whole = support.backtrack_weights(support.single(root, f"whole-{label}", world, *flags))
        support.save(whole, out / f"whole-{label}.pt", world)
        run = support.single(root, f"parts-{label}", world, *flags)
        assert support.backtrack_weights(run, signal_at=(1,), signal_rank=1) is None
        if stage == "zero2":
            messages = gather_objects(write_failure(run, step=3, rank=1), world)
            names = sorted(p.name for p in (run.folder / "backtrack" / "checkpoints").iterdir())
            assert names == ["step-00000002"], names  # nothing half written stays
            if world.main:
                (out / "messages.json").write_text(json.dumps(messages))
        support.save(support.backtrack_weights(run), out / f"parts-{label}.pt", world)


def evaluation(root, world):
    """An evaluation by two ranks, and one that finds some chunks made: those of another process."""
    flags = [*support.tiny_clip(root / "clip"), "evaluate.what=start", "evaluate.images=40", "evaluate.chunk=8"]
    flags += ["evaluate.batch=5", "evaluate.node_images=0"]
    evaluate(support.single(root, "ranks", world, *flags))
    run = support.single(root, "ranks-continued", world, *flags)
    job = Evaluation.prepare(run)
    source = find_source(run, "start")
    if world.main:
        alone = dataclasses.replace(run, world=World(0, 1, 0, world.device), _hashes={})
        with contextlib.suppress(KeyboardInterrupt):
            dataclasses.replace(job, run=alone, networks=DyingNetworks.of(job.networks)).score(
                source, job.opener(source)
            )
    barrier(world)
    evaluate(run)
    try:
        with ResultsFolder(root / "clip" / "open_clip_config.json").claimed(world):  # a file
            raise AssertionError("it was claimed")
    except UserError as error:
        assert "cannot be written: File exists" in str(error), error  # on every rank
    barrier(world)


@dataclasses.dataclass(frozen=True)
class DyingNetworks(Networks):
    """Ends the process that they belong to after two chunks."""

    calls: list = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, networks):
        return cls(networks.name, networks.images, networks.prompted)

    def rows(self, images, prompts):
        self.calls.append(1)
        if len(self.calls) > 4:
            raise KeyboardInterrupt
        return super().rows(images, prompts)


def poison(root, world):
    """A gradient that is not finite, on one rank of two."""
    sharded = support.sharded_zero3(root / "poison")
    for stage, precision in (("zero2", "fp32"), *((stage, "bf16") for stage in ("zero0", "zero2", sharded))):
        name, flags = f"{Path(stage).stem}-{precision}", (f"precision={precision}", "backtrack.steps=4")
        run = support.single(root, f"poison-{name}", world, *support.zero(stage), *flags)
        support.save(support.poisoned(run, (1,), rank=1), root / "poison" / f"{name}.pt", world)


def gan(root, world):
    """Backtracking with the GAN term: shared passes at ZeRO 2, and passes of its own at ZeRO 3."""
    for shared, stage in ((True, "zero2"), (False, support.sharded_zero3(root / "gan"))):
        run = support.single(root, f"gan-two-{shared}", world, *support.gan_flags(shared), *support.zero(stage))
        support.save(support.backtrack_weights(run), root / "gan" / f"{shared}.pt", world)


def everything(root, world):
    """Adapters, GAN term, recomputed activations, accumulation and clipping at once, on two nodes of two: optimizer states in
    four pieces at ZeRO 2; at ZeRO 3 the teacher is sharded within each node, and the run is stopped and resumed."""
    out = root / "everything"
    world = dataclasses.replace(world, local_rank=world.rank % 2)
    within = support.zero3_config(out / "within.json", shard_within_node=True)
    sharded = support.sharded_zero3(out)
    for stage in ("zero2", sharded):
        label, flags = f"{Path(stage).stem}-{world.size}", support.everything(root, stage)
        if stage == sharded:
            flags += (f"backtrack.teacher_ds_config={within}",)
        run = support.single(root, f"everything-{label}", world, *flags)
        if stage == sharded:
            assert support.backtrack_weights(run, signal_at=(1,), signal_rank=1) is None
        support.save(support.backtrack_weights(run), out / f"{label}.pt", world)
    folder = root / "base" / "pipeline" / "unet"
    config = deepspeed_config("teacher_node", 1, 1, 0.0, "fp32", world.size)
    teacher = Role("teacher", empty_network(folder), config, world, folder=folder)
    for s in teacher.weights.slices:
        assert s.size == 2 and s.end - s.start <= s.piece == -(-s.numel // 2)
        assert dist.get_process_group_ranks(s.group) == [world.rank // 2 * 2, world.rank // 2 * 2 + 1]


def switches(root, world):
    """Sixty target switches of a teacher that is sharded in part: what is gathered at the time of a switch must not
    survive it."""
    path, teacher = root / "base" / "path", root / "base" / "pipeline" / "unet"
    folders = [teacher, *(path / f"node-{i:04d}" for i in (1, 2, 3))]
    expected = [support.prediction(load_network(folder).eval()) for folder in folders]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(expected, 2))
    for threshold in (0, 20, 300, 10**9):
        file = support.zero3_config(root / "switches" / f"threshold-{threshold}.json", threshold)
        config = deepspeed_config(file, 2, 1, 0.0, "fp32", world.size)
        role = Role("teacher", empty_network(teacher), config, world, folder=teacher)
        reader = ReadAhead(role.weights, world.device)
        for step in range(15):
            node = step % 4
            role.weights.write(reader.take(folders[node]))
            reader.written()
            reader.begin(folders[(step + (1 if step % 3 else 2)) % 4])  # right two times of three
            for _ in range(step % 3):
                assert torch.allclose(support.prediction(role), expected[node], **support.ROUNDING), (threshold, step)
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


def verbs(root, world):
    """The verbs of root/verbs.json, run in root as a user runs them: [[verb, configuration, overrides...], ...]."""
    with contextlib.chdir(root):
        for name, config, *overrides in json.loads(Path("verbs.json").read_text()):
            {"record": record, "backtrack": backtrack}[name](Run(load_settings(Path(config), overrides), world))
            torch.nn.functional.linear = LINEAR  # see conftest.own_linear


def run(scenario: str, root: Path, world: World) -> None:
    if world.main:
        (root / scenario).mkdir(exist_ok=True)
    barrier(world)
    globals()[scenario](root, world)
    torch.nn.functional.linear = LINEAR  # see conftest.own_linear


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes to the log
    gc.set_threshold(700, 10, 10)  # as without tests/startup
    gc.freeze()  # libraries stay: DeepSpeed collects garbage with every network that it shards
    no_progress_bars()
    everyone = start()
    for line in [" ".join(sys.argv[1:])] if len(sys.argv) > 1 else sys.stdin:
        scenario, folder = line.strip().split(" ", 1)
        run(scenario, Path(folder), everyone)
        print("done", file=answers, flush=True)
    finish()
