"""Images per second of the evaluation, next to torch-fidelity, clean-fid and open_clip on the same images; the seconds of
the metrics; and whether memory grows with the number of images.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluate [--quick]

Networks have random weights, the same for all. Chains run from files to features, on one core without worker processes,
except in the row "all cores", where clean-fid has a worker per core and torch-fidelity its default. Repetitions are
interleaved (A B C A B C ...), and ratios are medians of those within a round: another's seconds / ours. Prints Markdown
tables.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.evaluate_chains import (
    CHUNK,
    CPU,
    WORLD,
    Averages,
    clean_fids,
    metrics,
    ours,
    torch_fidelitys,
    write_clip,
    write_images,
    write_inception,
)
from benchmarks.memory import peak_bytes, reset_peak, resident_bytes
from data.reference_images import ReferenceImages
from models.scorers.clip import LOCAL, ClipImages, ClipScore
from models.scorers.inception import Inception, network
from models.scorers.preprocess import Prepare, clean_resize, from_pil, over_threads, to_pil
from trainer.evaluation.generate import fill
from trainer.evaluation.rows import Rows

CLIP_SIDE = 256  # of DMD2's and GigaGAN's CLIP score
SMALL = (64, 256)  # files, and their side, of the measurement of memory


@dataclass(frozen=True)
class Profile:
    """Sizes are (height, width); the second does not divide anything. side: what ours crops and resizes to. many: images
    per repetition where only files are read. counts: images of the two measurements of memory. features: images and
    features of the metrics."""

    rounds: int = 3
    images: int = 12
    many: int = 128
    batch: int = 16
    sizes: tuple[tuple[int, int], ...] = ((512, 512), (427, 641))
    side: int = 512
    clip: str = "ViT-B-32"
    counts: tuple[int, int] = (64, 512)
    features: tuple[int, int] = (2000, 2048)


QUICK = Profile(rounds=1, images=4, many=32, batch=4, features=(400, 256), counts=(64, 256))


@contextmanager
def one_core() -> Iterator[None]:
    """Our own threads are as many as there are cores to run on."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@dataclass(frozen=True)
class Comparison:
    """Ways to do the same: seconds of each round, on the clock and of the CPU, and features. Ours is the first."""

    title: str
    images: int
    spent: dict[str, list[tuple[float, float]]]
    features: dict[str, Tensor]

    @classmethod
    def of(cls, title: str, images: int, rounds: int, ways: dict[str, Callable[[], Tensor]]) -> "Comparison":
        features = {name: work() for name, work in ways.items()}  # warms up
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, work in ways.items():
                began, cpu = time.perf_counter(), cpu_seconds()
                work()
                spent[name].append((time.perf_counter() - began, cpu_seconds() - cpu))
        return cls(title, images, spent, features)

    def difference(self, name: str) -> float:
        """The largest between its features and ours, in standard deviations of ours over the images."""
        first = next(iter(self.features.values()))
        return float((self.features[name] - first).abs().max() / first.std(0).mean())

    def ratios(self, name: str) -> tuple[float, float]:
        """Its seconds / ours, on the clock and of the CPU."""
        pairs = list(zip(self.spent[name], next(iter(self.spent.values())), strict=True))
        return tuple(statistics.median(mine[i] / first[i] for mine, first in pairs) for i in (0, 1))

    def lines(self) -> str:
        text = ""
        for name, times in self.spent.items():
            rate = self.images / statistics.median(wall for wall, _ in times)
            clock, cpu = self.ratios(name)
            text += f"| {self.title} | {name} | {rate:.2f} | {clock:.2f} | {cpu:.2f} | {self.difference(name):.1g} |\n"
        return text


def inception(root: Path, profile: Profile) -> Iterator[Comparison]:
    """From files to Inception features, for each size of images."""
    file = root / "inception.pth"
    write_inception(file)
    scorer, prepare = Inception(file, CPU), Prepare("square", profile.side)
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    layers = network()
    layers.load_state_dict(torch.load(file))
    layers = layers[:-1].eval().requires_grad_(False)
    batch = profile.batch

    def cropped(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(to_pil(prepare(from_pil(pixels))))

    for size in profile.sizes:
        folder = root / f"{size[0]}x{size[1]}"
        write_images(folder, profile.images, size)
        ways = {
            "ours": lambda at=folder: ours(at, root, batch, lambda made, _: scorer(over_threads(prepare, made))),
            "clean-fid, cropped as ours": lambda at=folder: clean_fids(at, batch, layers, 0, cropped),
            "clean-fid": lambda at=folder: clean_fids(at, batch, layers, 0),
            "torch-fidelity": lambda at=folder: torch_fidelitys(at, batch, theirs, workers=False),
        }
        if size == (profile.side,) * 2:  # nothing to crop
            del ways["clean-fid, cropped as ours"]
        with one_core():
            yield Comparison.of(f"{folder.name}, Inception", profile.images, profile.rounds, ways)


def without_network(root: Path, profile: Profile) -> Comparison:
    """From files to a network's input, on all cores: what limits a GPU."""
    folder, layers = root / "many", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    folder.mkdir()
    files = sorted((root / f"{profile.sizes[0][0]}x{profile.sizes[0][1]}").iterdir())
    for number in range(profile.many):
        os.link(files[number % len(files)], folder / f"{number:04d}.png")
    scorer, prepare = Inception(root / "inception.pth", CPU), Prepare("square", profile.side)
    scorer.network, theirs = layers, Averages("averages", ["3"])
    workers = len(os.sched_getaffinity(0))
    ways = {
        "ours": lambda: ours(folder, root, profile.batch, lambda made, _: scorer(over_threads(prepare, made))),
        "clean-fid": lambda: clean_fids(folder, profile.batch, layers, workers),
        "torch-fidelity": lambda: torch_fidelitys(folder, profile.batch, theirs, workers=True),
    }
    return Comparison.of(
        f"{profile.sizes[0][0]}x{profile.sizes[0][1]}, no network, all cores", profile.many, profile.rounds, ways
    )


def clip(root: Path, profile: Profile, config: dict) -> Iterator[Comparison]:
    """From files to CLIP scores, next to open_clip called by hand, and to image features, next to torch-fidelity, whose
    network has another GELU. config: the network's, in open_clip's form."""
    folder, model = root / f"{profile.sizes[0][0]}x{profile.sizes[0][1]}", root / "clip"
    write_clip(model, config)
    score = ClipScore(f"{LOCAL}{model}", "", CPU, prepare=Prepare("square", CLIP_SIDE))
    images = ClipImages(f"{LOCAL}{model}", "", CPU)
    theirs = FeatureExtractorCLIP(
        "clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(model / "torch_fidelity.pt")
    )
    captions = [f"a photo of {number} things on a table" for number in range(profile.images)]
    plain, _, transform = open_clip.create_model_and_transforms(f"{LOCAL}{model}")
    plain.eval()
    tokenizer, files = open_clip.get_tokenizer(f"{LOCAL}{model}"), sorted(folder.iterdir())

    def by_hand() -> Tensor:
        found = []
        for first in range(0, len(files), profile.batch):
            part = slice(first, first + profile.batch)
            small = [
                Image.open(file).convert("RGB").resize((CLIP_SIDE, CLIP_SIDE), Image.Resampling.LANCZOS)
                for file in files[part]
            ]
            with torch.no_grad():
                seen = plain.encode_image(torch.stack([transform(image) for image in small]))
                read = plain.encode_text(tokenizer(captions[part]))
            found.append((functional.normalize(seen, dim=1) * functional.normalize(read, dim=1)).sum(1))
        return torch.cat(found)[:, None]

    def measure(made: list[Tensor], numbers: list[int]) -> Tensor:
        return score(made, [captions[number] for number in numbers])[:, None]

    scored = {"ours": lambda: ours(folder, root, profile.batch, measure), "open_clip by hand": by_hand}
    featured = {
        "ours, images only": lambda: ours(folder, root, profile.batch, lambda made, _: images(made)),
        "torch-fidelity, images only": lambda: torch_fidelitys(folder, profile.batch, theirs, workers=False),
    }
    with one_core():
        yield Comparison.of(f"{folder.name}, CLIP score", profile.images, profile.rounds, scored)
        yield Comparison.of(f"{folder.name}, CLIP features", profile.images, profile.rounds, featured)


def memory(root: Path, counts: list[int]) -> list[int]:
    """Bytes by which this process grows at most while it makes the rows of so many images, a few files in turn; the
    network is an average. The first number of images is made once before that."""
    files, side = SMALL
    write_images(root / "small", files, (side, side))
    images, average, growth = ReferenceImages(root / "small"), nn.AdaptiveAvgPool2d(26), []  # 2,028 features
    for place, count in enumerate((counts[0], *counts)):
        rows = Rows.open(root / f"memory{place}", count, CHUNK, {}, WORLD)
        before = resident_bytes()
        reset_peak()
        fill(
            rows,
            WORLD,
            lambda numbers: [images[number % files] for number in numbers],
            lambda made, _: {"features": average(clean_resize(made)).flatten(1)},
            16,
            "memory",
        )
        growth.append(peak_bytes() - before)
    return growth[1:]


def memory_alone(counts: tuple[int, ...]) -> list[int]:
    """`memory` in a process of its own, which returns freed memory to the system: glibc would keep up to 60 MB."""
    call = [sys.executable, "-m", "benchmarks.evaluate", "--memory", ",".join(map(str, counts))]
    return json.loads(subprocess.check_output(call, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}))


def report(root: Path, profile: Profile) -> None:
    """Measures and prints everything."""
    print(
        "| images, network | chain | images/s | seconds / ours | CPU seconds / ours | difference |\n" + "|---" * 6 + "|"
    )
    for found in inception(root, profile):
        print(found.lines(), end="", flush=True)
    print(without_network(root, profile).lines(), end="", flush=True)
    for found in clip(root, profile, open_clip.get_model_config(profile.clip)):
        print(found.lines(), end="", flush=True)
    count, size = profile.features
    print(f"\n| metric of 2 x {count} x {size} features | tool | seconds | value |\n|---|---|---|---|")
    for metric, tools in metrics(root, count, size).items():
        for tool, compute in tools.items():
            began = time.perf_counter()
            values = ", ".join(f"{value:.6g}" for value in compute())
            print(f"| {metric} | {tool} | {time.perf_counter() - began:.2f} | {values} |", flush=True)
    print("\n| images | peak memory grows by | their pixels |\n|---|---|---|")
    for number, growth in zip(profile.counts, memory_alone(profile.counts), strict=True):
        print(f"| {number} | {growth / 1e6:.1f} MB | {number * 3 * SMALL[1] ** 2 / 1e6:.0f} MB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and less: to try the script")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # those of other libraries
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            print(json.dumps(memory(Path(folder), [int(count) for count in args.memory.split(",")])))
            return
        print(f"load average {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
        report(Path(folder), QUICK if args.quick else Profile())


if __name__ == "__main__":
    main()
