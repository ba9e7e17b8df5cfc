"""What a backtracking step does: how often each network runs, and that nothing in it waits for the device."""

import traceback
from collections import Counter

import pytest
import support
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.backtrack import Backtracking
from trainer.training.metrics import Meters
from trainer.training.run import Run

UPDATES = 3
READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}


def cycle(shards, pipeline, world, *overrides, watch=None):
    """Network calls, by role and kind, of the second cycle of a real stage; the first has warmed up."""
    fixed = (f"pipeline={pipeline}", "backtrack.path=none", "backtrack.batch=4", f"backtrack.fake_updates={UPDATES}")
    settings = support.tiny(shards, "calls", *fixed, "backtrack.steps=6", *overrides)
    run = Run(settings, world)
    run.stage_folder("backtrack")
    stage, meters, calls = Backtracking(run), Meters(), Counter()
    try:
        stage.begin(0)
        for step in range(2 * UPDATES):
            if step == UPDATES:
                for name, role in stage.roles.items():

                    def count(module, args, out, name=name):
                        calls[name, "grad" if torch.is_grad_enabled() and out[0].requires_grad else "no grad"] += 1
                        calls[name, "samples"] += len(args[0])

                    role.module.register_forward_hook(count)
                stage.sampler.text.parts.text_encoder.register_forward_hook(lambda *_: calls.update(["text"]))
                read = stage.dataset.read
                stage.dataset.read = lambda row, read=read: calls.update(["rows read"]) or read(row)
            if watch and step >= UPDATES:
                with watch:
                    stage.update(step, meters, until_log=1000)
            else:
                stage.update(step, meters, until_log=1000)
    finally:
        stage.close()
    return calls


@pytest.mark.parametrize(
    ("reuse", "guidance", "doubled", "accumulation"),
    [(True, 8.0, True, 1), (False, 8.0, True, 2), (True, 1.0, True, 2), (True, 8.0, False, 2)],
)
def test_networks_run_as_often_as_they_must(shards, pipeline, world, reuse, guidance, doubled, accumulation):
    options = (f"backtrack.reuse_x0={reuse}", f"backtrack.guidance_scale={guidance}")
    options += (f"backtrack.guidance_batch={doubled}",)
    calls = cycle(shards, pipeline, world, *options, f"backtrack.accumulation={accumulation}")
    batch, fresh = 4, 0 if reuse else UPDATES - 1  # fake updates that make samples of their own
    assert calls["generator", "grad"] == accumulation
    assert calls["generator", "no grad"] == fresh * accumulation
    assert calls["generator", "samples"] == (1 + fresh) * batch
    assert calls["teacher", "grad"] == 0 and calls["teacher", "no grad"] == accumulation * (1 if doubled else 2)
    assert calls["teacher", "samples"] == batch * (1 if guidance == 1 else 2)
    assert calls["fake_score", "grad"] == UPDATES * accumulation
    assert calls["fake_score", "no grad"] == accumulation
    assert calls["text"] == (1 + fresh) * accumulation
    assert calls["rows read"] == (1 + fresh) * batch


class Reads(TorchFunctionMode):
    """Counts reads of tensors' values by who asks: our code, or a library."""

    def __init__(self):
        super().__init__()
        self.ours, self.libraries = Counter(), Counter()

    def note(self, what):
        frames = [
            f for f in traceback.extract_stack() if "test_calls" not in f.filename and "/torch/" not in f.filename
        ]
        last = frames[-1]
        mine = last.filename.startswith(str(support.REPOSITORY)) and "site-packages" not in last.filename
        (self.ours if mine else self.libraries)[f"{what} at {last.filename}:{last.lineno}"] += 1

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS and any(t is torch.Tensor or issubclass(t, torch.nn.Parameter) for t in types):
            self.note(name)
        return function(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Also what reads a value below Python, as adding a tensor as a number does."""

    def __init__(self):
        super().__init__()
        self.reads = Reads()

    def __enter__(self):
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.reads.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads.note("scalar")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["zero0", "zero1"])
def test_nothing_in_a_step_reads_a_tensor(shards, pipeline, world, stage, capsys):
    watch = Watch()
    cycle(shards, pipeline, world, *support.zero(stage), "backtrack.ema=0.9", watch=watch)
    with capsys.disabled():
        print(f"\n{stage}: reads by libraries in a cycle: {dict(watch.reads.libraries) or 'none'}")
    assert not watch.reads.ours


def test_the_watch_sees_reads():
    watch, x = Watch(), torch.ones(2)
    with watch:
        if x.sum() > 1 and float(x[0]) and x.tolist():
            x[0].item()
    seen = watch.reads.ours + watch.reads.libraries
    assert sum(seen.values()) >= 4
