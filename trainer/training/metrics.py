"""The metrics of a stage: one JSON line per logging interval, trackers, and a progress line with the time left."""

import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.sampling_order import BatchSplit
from trainer.checkpoint.directory import step_name
from trainer.checkpoint.files import write_text
from trainer.distributed.logs import duration, log
from trainer.distributed.world import World, mean_over_ranks
from trainer.planner.flops import card_peak
from trainer.training.background import Background
from trainer.training.trackers import HANG_SECONDS, Trackers

KEYS = (
    "step images_seen epoch time compute gpu_hours step_seconds data_seconds images_per_second memory_gb tflops_per_gpu mfu "
    "save_seconds "
    "loss/fake_score loss/gan_generator loss/gan_head grad_norm/generator grad_norm/fake_score "
    "update_ratio/generator update_ratio/fake_score lr/generator lr/fake_score target_node mismatch fake_score_error "
    "sample_spread skipped_samples skipped interrupted_reads truncated_captions skipped_updates"
).split()


class Meters:
    """Sums of named scalars on the device. They are read, which waits for the device, at logging intervals only."""

    def __init__(self, split: BatchSplit) -> None:
        self.split = split
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        value = value.detach().double() if isinstance(value, Tensor) else float(value)
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, world: World) -> dict[str, float]:
        """Means over the interval and over ranks; the sums start again from zero. Every rank must call it at the same
        step, having added the same names."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = [torch.as_tensor(self.sums[n], dtype=torch.float64).to(world.device) / self.counts[n] for n in names]
        values = mean_over_ranks(torch.stack(means), world).tolist()  # the one device synchronisation
        self.sums.clear()
        self.counts.clear()
        return dict(zip(names, values, strict=True))

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """Gives every rank the mean over the ranks that saved `states`. With another accumulation a micro-step counts in
        proportion, so that the interval's mean stays one over steps."""
        scale = self.split.accumulation / saved.accumulation
        counts = states[0]["counts"]
        sums = {name: sum(float(s["sums"][name]) for s in states) / len(states) * scale for name in counts}
        return {"sums": sums, "counts": {name: count * scale for name, count in counts.items()}}

    def state_dict(self) -> dict:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device on a GPU, of this process on a CPU; in units of 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, if it is known."""
    return card_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class MetricsWriter:
    """Writes a stage's metrics.jsonl and sample grids, also to trackers. Every rank may call it; only rank 0 writes.

    The other ranks would wait for rank 0: a thread compresses the grids (seconds for those of 1024 px images) and does all
    logging to trackers, in order. `join` waits for it.

    On a resume, lines after the resumed step are cut off: the file becomes what an uninterrupted run would have written.
    """

    def __init__(
        self, folder: Path, world: World, name: str, steps: int, first: int, trackers: Sequence[str], config: dict
    ):
        """first: the resumed step. trackers: `loop.trackers`. config: of the run, for them."""
        self.folder, self.world, self.name, self.steps = folder, world, name, steps
        self.first, self.began = first, time.monotonic()
        self.peak = peak_tflops(world.device)
        self.file = self.trackers = self.background = None
        if not world.main:
            return
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= first]
        write_text("".join(kept), path, durable=False)
        self.file = path.open("a", buffering=1)
        self.trackers = Trackers(trackers, folder, first, config)
        self.background = Background()

    def line(self, step: int, values: dict[str, float | int | None]) -> None:
        """One line at a step (counted from 1). Missing keys are null."""
        if not self.world.main:
            return
        speed = values.get("tflops_per_gpu")
        if speed and self.peak:
            values = values | {"mfu": speed / self.peak}
        record = dict.fromkeys(KEYS) | {"step": step, "memory_gb": memory_gb(self.world.device)} | values
        self.file.write(json.dumps(record) + "\n")
        scalars = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        self.background.submit(self.trackers.scalars, step, scalars)
        self._progress(step, record)

    def _progress(self, step: int, record: dict) -> None:
        done = step - self.first
        left = (time.monotonic() - self.began) / done * (self.steps - step) if done else 0.0
        parts = [f"{self.name} {step}/{self.steps} ({100 * step // self.steps}%)", f"ETA {duration(left)}"]
        if record["step_seconds"]:
            parts += [f"{record['step_seconds']:.3f} s/step", f"{record['images_per_second']:.0f} img/s"]
        if record["target_node"] is not None:
            parts.append(f"target node {record['target_node']}")
        shown = [k for k in record if k.startswith("loss/") or k in ("mismatch", "distance")]
        parts += [f"{k} {record[k]:.4g}" for k in shown if record[k] is not None]
        log.info("  ".join(parts))

    def image(self, step: int, grid: Tensor) -> None:
        """A uint8 grid [3, H, W] on the CPU to samples/step-00000500.png and to the trackers."""
        if self.world.main:
            self.background.submit(self._write_image, step, grid)

    def _write_image(self, step: int, grid: Tensor) -> None:
        from torchvision.io import write_png

        file = self.folder / "samples" / f"{step_name(step)}.png"
        try:
            file.parent.mkdir(exist_ok=True)
            write_png(grid, str(file))
        except Exception as error:  # of several libraries, in a thread: a grid is an extra
            log.warning(f"{file} cannot be written ({error}); training goes on without this grid")
        else:
            self.trackers.image(step, file)

    def join(self) -> None:
        """Waits until everything so far is in its files and trackers. A tracker that hangs is dropped."""
        while self.world.main and not self.background.join(HANG_SECONDS):
            if self.trackers.drop_hanging():
                self.background.abandon()

    def close(self) -> None:
        if not self.world.main:
            return
        try:
            self.join()
        finally:
            self.background.close()
            self.file.close()
            self.trackers.close()
