"""Scenarios for several processes; started by torchrun from the tests. Usage: ranks.py SCENARIO ROOT."""

import sys
from pathlib import Path

import support

from trainer.distributed import barrier, finish, start
from trainer.quiet import no_progress_bars
from trainer.record import record
from trainer.run import Run


def parity(root, world):
    """Backtracking at every ZeRO stage, with two ranks; the weights go to root/parity/."""
    for stage in ("zero0", "zero1", "zero2", "zero3", support.sharded_zero3(root / "parity")):
        label = Path(stage).stem
        run = support.single(root, f"two-{label}", world, *support.PARITY, *support.zero(stage))
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


def recording(root, world):
    """Stage 1 with two ranks at sharded ZeRO-3."""
    stage = support.sharded_zero3(root / "recording")
    flags = (f"record.ds_config={stage}", f"record.teacher_ds_config={stage}", f"path={root / 'recording' / 'two'}")
    record(Run(support.tiny(root, "recording-two", *support.RECORDING, *flags), world))


def lora(root, world):
    """LoRA with two ranks: stage 2 at ZeRO 1 and 3, stopped and resumed at ZeRO 3, and stage 1 at ZeRO 3."""
    stage = support.sharded_zero3(root / "lora")
    for name in ("zero1", stage):
        label, flags = Path(name).stem, (*support.PARITY, *support.lora(root), *support.zero(name))
        run = support.single(root, f"lora-two-{label}", world, *flags)
        support.save(support.backtrack_weights(run), root / "lora" / f"{label}.pt", world)
    run = support.single(root, "lora-two-parts", world, *flags)
    assert support.backtrack_weights(run, signal_at=(3,), signal_rank=1) is None
    support.save(support.backtrack_weights(run), root / "lora" / "parts.pt", world)
    flags = (f"record.ds_config={stage}", f"record.teacher_ds_config={stage}", f"path={root / 'lora' / 'path'}")
    record(Run(support.tiny(root, "lora-recording-two", *support.RECORDING, *support.LORA, *flags), world))


if __name__ == "__main__":
    no_progress_bars()
    everyone = start()
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    if everyone.main:
        (folder / scenario).mkdir(exist_ok=True)
    barrier(everyone)
    globals()[scenario](folder, everyone)
    finish()
