"""Times, FLOP and peak memory of the real stages, step by step."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.memory import peak_bytes, reset_peak
from models.errors import ModelError
from models.profile import count_flops
from trainer.backtrack import Backtracking
from trainer.config.schema import RunSettings
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.record import Recording
from trainer.training.metrics import peak_tflops
from trainer.training.run import Run

STAGES = {"record": Recording, "backtrack": Backtracking}
TURN, UPDATE = "generator turn", "fake update"
WARM_UP = 3  # steps, or a cycle if that is longer


class Probe:
    """Seconds, FLOP and peak memory of calls, by kind. On a GPU it waits for every call, before and after."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.seconds: dict[str, list[float]] = {TURN: [], UPDATE: []}
        self.peaks = {TURN: 0, UPDATE: 0}  # bytes: the allocator's on a GPU, the process's on a CPU
        self.flops = {TURN: 0.0, UPDATE: 0.0}  # per call
        self.counting = True  # the first call of a kind, which also warms up

    def call(self, kind: str, call: Callable[[], object]) -> object:
        if self.counting:
            return self._count(kind, call)
        self._wait()
        (torch.cuda.reset_peak_memory_stats if self.gpu else reset_peak)()
        began = time.perf_counter()
        result = call()
        self._wait()
        self.seconds[kind].append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() if self.gpu else peak_bytes()
        self.peaks[kind] = max(self.peaks[kind], peak)
        return result

    def _count(self, kind: str, call: Callable[[], object]) -> object:
        kept = []
        # The counter knows the kernels of a GPU, but of a CPU's only the plain one.
        with nullcontext() if self.gpu else sdpa_kernel(SDPBackend.MATH):
            self.flops[kind] = count_flops(lambda: kept.append(call()))
        return kept[0]

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def measure(name: str, settings: RunSettings, steps: int, world: World) -> dict:
    """The row of one stage after a warm-up of whole cycles: the kernel; seconds (median), peak GB and executed TFLOP/s by
    kind of call; seconds, TFLOP/s and MFU (without recomputation) of an average step.

    With `reuse_x0: false` a fake update contains its new samples. A row without figures has the reason: an attention
    kernel that cannot run here, or insufficient memory.
    """
    try:
        return _measure(name, settings, steps, world)
    except (ModelError, UserError) as error:
        return {"reason": str(error)}
    except RuntimeError as error:  # from the device, pinned or host memory: they only share some words
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):
            raise
        return {"reason": str(error).splitlines()[0]}


def _measure(name: str, settings: RunSettings, steps: int, world: World) -> dict:
    run = Run(settings, world)
    run.stage_folder(name)
    stage, probe = STAGES[name](run), Probe(world.device)
    cycle = settings.backtrack.fake_updates if name == "backtrack" else 1
    if name == "backtrack":
        if cycle == 1:
            raise UserError("backtrack.fake_updates=1 leaves no step without a generator turn to time: use 2 or more")
        turn, average = stage.update_generator, stage.average.update
        stage.update_generator = lambda *args: probe.call(TURN, lambda: turn(*args))
        stage.average.update = lambda n: average(n) if probe.counting else probe.call(TURN, lambda: average(n))
    try:
        stage.begin(0)
        turns, warm = [], cycle * max(WARM_UP // cycle, 1)
        for step in range(warm + max(steps // cycle, 1) * cycle):
            probe.counting = step < warm
            if step % cycle or cycle == 1:
                probe.call(UPDATE, lambda step=step: stage.update(step))
            else:  # its parts are timed separately, since each has its own peak memory
                began = time.perf_counter()
                stage.update(step)
                probe._wait()
                if not probe.counting:
                    turns.append(time.perf_counter() - began)
    finally:
        stage.close()
    return _row(stage, probe, turns, cycle)


def _row(stage: Recording | Backtracking, probe: Probe, turns: list[float], cycle: int) -> dict:
    parts = probe.seconds[TURN]
    accumulation = stage.settings.accumulation
    if parts:  # the micro-batches of a turn, then the weight average
        size = accumulation + 1
        parts = [sum(parts[i : i + size]) for i in range(0, len(parts), size)]
    seconds = {TURN: statistics.median(parts) if parts else None, UPDATE: statistics.median(probe.seconds[UPDATE])}
    whole = (sum(turns) + sum(probe.seconds[UPDATE])) / (len(turns) + len(probe.seconds[UPDATE]))
    known = stage.builder.attention != "xformers"
    row = {"kernel": stage.builder.attention, "step_seconds": whole, "step_tflops": stage.flops / whole / 1e12}
    peak = peak_tflops(stage.world.device)
    row["mfu"] = row["step_tflops"] / peak if peak else None
    for kind, value in seconds.items():
        calls = accumulation if kind == TURN else 1
        executed = probe.flops[kind] * calls
        row[kind] = None if value is None else {
            "seconds": value,
            "peak_gb": probe.peaks[kind] / 1e9,
            "tflops": executed / value / 1e12 if known else None,
            "tflop": executed / 1e12 if known else None,
        }  # fmt: skip
    return row
