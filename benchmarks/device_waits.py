"""Waits for the device, reads of its tensors and small operations of a training cycle, counted on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.device_waits [--stages 0,1,2,3] [--precision bf16] [KEY=VALUE ...]

On a CPU no wait costs anything, so none shows. Here DeepSpeed is told that its device is asynchronous, like a GPU, and its
streams and events count how often they are waited for. One cycle of the real backtracking stage (a generator update and five
fake-score updates) is counted after a warm-up of three, plain and with the GAN term. With torchrun, rank 0 is counted.
Prints a Markdown table.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.distributed.logs  # noqa: F401  before the libraries
from benchmarks.pipeline import write_captions
from models.miniature import build_miniature
from models.settings import MiniatureSettings
from trainer.backtrack import Backtracking
from trainer.config.load import load_settings
from trainer.config.schema import RunSettings
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import World, from_main, start
from trainer.training.run import Run

UPDATES, WARM_UP, RESOLUTION = 5, 3, 16
REPOSITORY = Path(__file__).resolve().parent.parent
# Reads below Python: of one value (`item`, `float`, `if`), and of what depends on values.
READING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
LISTS = {"tolist", "numpy"}  # reads that no operation shows
FREE = ("aten::empty", "aten::new_empty", "aten::_local_scalar_dense", "profiler::")  # no kernel


class _Lists(TorchFunctionMode):
    def __init__(self, counts: "Counts"):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in LISTS and any(issubclass(t, torch.Tensor) for t in types):
            self.counts.note(self.counts.reads, name)
        return function(*args, **(kwargs or {}))


class Counts(TorchDispatchMode):
    """Counts within its context, by place: `reads` of tensors' values and `waits` for the device (those of `asynchronous`);
    and `operations`, which would each be a kernel or more. ours: the reads and waits by our own code."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.waits, self.ours = Counter(), Counter(), Counter()
        self.operations: Counter[str] = Counter()
        self._lists = _Lists(self)

    def note(self, counter: Counter, what: str) -> None:
        frame = sys._getframe(1)
        while any(part in frame.f_code.co_filename for part in ("benchmarks/device_waits", "/torch/")):
            frame = frame.f_back
        file = frame.f_code.co_filename
        place = f"{what} at {file}:{frame.f_lineno}"
        counter[place] += 1
        if file.startswith(str(REPOSITORY)) and "site-packages" not in file:
            self.ours[place] += 1

    def __enter__(self) -> "Counts":
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READING:
            self.note(self.reads, function.name())
        if not function.is_view and not function.name().startswith(FREE):
            self.operations[function.name()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def asynchronous(counts: Counts) -> Iterator[None]:
    """Within the block DeepSpeed takes this CPU for an asynchronous device, and what waits for it is counted. Engines must
    be made in the block."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Queue:
        """A stream or an event."""

        def __init__(self, *args: object, **options: object):
            pass

        def synchronize(self) -> None:
            counts.note(counts.waits, "stream or event")

        def query(self) -> bool:
            return False

        def record(self, *args: object) -> None:
            pass

        wait_stream = wait_event = wait = record

    class Asynchronous(CPU_Accelerator):
        Stream = Event = Queue

        def is_synchronized_device(self) -> bool:
            return False

        def synchronize(self, device_index: int | None = None) -> None:
            counts.note(counts.waits, "device")

        def current_stream(self, device_index: int | None = None) -> Queue:
            return Queue()

        default_stream = current_stream

        def stream(self, stream: Queue) -> AbstractContextManager:
            return nullcontext()

    real, record_stream = get_accelerator(), torch.Tensor.record_stream
    torch.Tensor.record_stream = lambda tensor, stream: None
    set_accelerator(Asynchronous())
    try:
        yield
    finally:
        set_accelerator(real)
        torch.Tensor.record_stream = record_stream


def count_cycle(run: Run) -> tuple[Counts, Counts]:
    """Counts of one cycle of backtracking, and of the optimizer steps in it."""
    cycle, updates = Counts(), Counts()
    length = run.settings.backtrack.fake_updates
    with asynchronous(cycle):
        stage = Backtracking(run)
        try:
            stage.begin(0)
            for step in range(WARM_UP * length):
                stage.update(step)
            cycle.waits.clear()
            cycle.ours.clear()
            for role in stage.trained.values():
                role.engine.step = _within(updates, role.engine.step)
            with cycle:
                for step in range(WARM_UP * length, (WARM_UP + 1) * length):
                    stage.update(step)
        finally:
            stage.close()
    return cycle, updates


def _within(counts: Counts, call: Callable[[], None]) -> Callable[[], None]:
    def counted() -> None:
        with counts:
            call()

    return counted


def _settings(root: Path, stage: int, gan: bool, precision: str, more: list[str]) -> RunSettings:
    engine = ["zero0", "zero1", "zero2", "zero3"][stage]
    flags = [
        f"run={root}/run", f"pipeline={root}/pipeline", f"precision={precision}", f"data.train={root}/shards",
        f"data.resolution={RESOLUTION}", "backtrack.path=none", f"backtrack.fake_updates={UPDATES}",
        f"backtrack.steps={100 * UPDATES}", "backtrack.batch=2", "backtrack.generator_ds_config=" + engine,
        "backtrack.fake_score_ds_config=" + engine, f"gan.enabled={gan}", *more,
    ]  # fmt: skip
    return load_settings(REPOSITORY / "configs" / "tiny_sdxl.yaml", flags)


def _row(root: Path, stage: int, gan: bool, world: World, args: argparse.Namespace) -> str:
    run = Run(_settings(root, stage, gan, args.precision, args.overrides), world)
    run.stage_folder("backtrack")
    cycle, updates = count_cycle(run)
    device = sum(n for place, n in cycle.waits.items() if place.startswith("device"))
    cells = [f"ZeRO-{stage}", "GAN" if gan else "plain", device, cycle.waits.total() - device, cycle.reads.total()]
    cells += [round(updates.operations.total() / (UPDATES + 1)), cycle.ours.total()]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages of generator and fake score")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    no_progress_bars()
    world = start()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(from_main(temporary, world))
        if world.main:
            build_miniature(MiniatureSettings(resolution=RESOLUTION)).save_pretrained(root / "pipeline")
            write_captions(root / "shards", RESOLUTION)
        from_main(None, world)
        if world.main:
            print(
                "| engines | run | waits for the device | for a stream or event | reads | operations per update | ours |"
            )
            print("|---|---|---|---|---|---|---|")
        for stage in map(int, args.stages.split(",")):
            for gan in (False, True):
                row = _row(root, stage, gan, world, args)
                if world.main:
                    print(row, flush=True)


if __name__ == "__main__":
    main()
