"""Samples per second and core of reading: our local shards and streams beside the bare decoder and plain WebDataset.

    python -m benchmarks.data [--seconds 3]
    python -m benchmarks.data --open 10000

Prints one JSON line per kind of sample. One process with one thread reads the same shards in four ways, in turn, and the best of
three rounds counts. "decoder" is what must be done to a sample anyhow, on bytes in memory: decoding, resizing, cropping and
stacking; unpacking and stacking tensors; cleaning a caption. "webdataset" is the pipeline that its documentation recommends, with the
same shuffle buffer as our stream, Pillow's decoder and torchvision's resize.

--open measures the opening of that many shards of four samples instead, in seconds, plain and with a filter: for the first time,
again from the shards' own indexes and facts, and again from the one file of data/gathered_file.py.
"""

import argparse
import io
import itertools
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import webdataset
from PIL import Image
from torchvision.transforms import v2

from data.captions import clean_caption
from data.encoded import RECORD_KEY, pack_tensors, unpack_tensors
from data.gathered_file import PREFIX
from data.images import decode, resize_and_crop
from data.loader import Batches
from data.sampling_order import BatchSplit
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand
from data.shard_writer import write_shards
from data.streams import StreamBatches, StreamDataset

MICRO, BUFFER, ROUNDS = 8, 256, 3
# name: side of the stored image, side that is trained on, samples
IMAGES = {"1024 -> 1024": (1024, 1024, 64), "1024 -> 512": (1024, 512, 64), "512 -> 512": (512, 512, 256)}
TEXT = "a photograph of a red bicycle that leans on a brick wall, in the evening sun"


def picture(side: int, seed: int) -> bytes:
    """A JPEG of quality 90 with detail at several scales, as a photograph has it."""
    rng, size = np.random.default_rng(seed), (side, side)
    parts = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize(size, Image.BICUBIC), np.float32)
        for n in (4, 16, 64, 256)
    ]
    file = io.BytesIO()
    Image.fromarray(np.average(parts, axis=0, weights=(4, 3, 2, 1)).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def latent(seed: int) -> dict:
    """An encoded sample of a 1024 px image."""
    mean = torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    record = {
        "resolution": 1024,
        "vae": "x",
        "text": None,
        "precision": "bf16",
        "original_size": [1024, 1024],
        "crop": [0, 0],
    }
    tensors = {"latent_mean": mean, "latent_std": torch.full_like(mean, 0.1)}
    return {"safetensors": pack_tensors(tensors), "txt": TEXT, "json": {RECORD_KEY: record}}


def rate(make: Callable[[], Iterator[int]], seconds: float) -> float:
    """Samples per second of CPU time of an endless iterator over numbers of samples, after its first micro-batches. CPU time,
    since others may use the machine; the files are in its memory."""
    steps = make()
    for _ in range(3):
        next(steps)
    count, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        count += next(steps)
    return count / (time.process_time() - began)


def bare(raws: list[bytes], work: Callable[[bytes], object]) -> Iterator[int]:
    """work: on one sample; tensors that it returns are stacked into micro-batches."""
    for first in itertools.cycle(range(0, len(raws), MICRO)):
        made = [work(raw) for raw in raws[first : first + MICRO]]
        if isinstance(made[0], torch.Tensor):
            torch.stack(made)
        yield len(made)


def batches(reader) -> Iterator[int]:
    for batch in reader:
        yield len(batch.captions)


def plain(shards: list[str], stages: list) -> Iterator[int]:
    """WebDataset's own pipeline; stages: after its shuffle."""
    source = webdataset.ResampledShards(shards), webdataset.tarfile_to_samples(), webdataset.shuffle(BUFFER)
    for batch in webdataset.DataPipeline(*source, *stages, webdataset.batched(MICRO)):
        yield len(batch[0])


def measure(
    name: str, shards: list[Path], want: tuple, size: int, bare_work: tuple, stages: list, seconds: float
) -> dict:
    urls = [str(path) for path in shards]
    data = DataSettings(resolution=size, shuffle_buffer=BUFFER)
    split = BatchSplit(1, MICRO)
    ways = {
        "decoder": lambda: bare(*bare_work),
        "local": lambda: batches(Batches(ShardDataset(shards, size, want), split, 0)),
        "streamed": lambda: batches(StreamBatches(StreamDataset([urls], want, 0, data), split, 0)),
        "webdataset": lambda: plain(urls, stages),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for way, make in ways.items():
            best[way] = max(best[way], rate(make, seconds / ROUNDS))
    ratios = {
        "local/decoder": best["local"] / best["decoder"],
        "local/webdataset": best["local"] / best["webdataset"],
        "streamed/webdataset": best["streamed"] / best["webdataset"],
    }
    return (
        {"kind": name}
        | {way: round(value, 1) for way, value in best.items()}
        | {k: round(v, 2) for k, v in ratios.items()}
    )


def run(folder: Path, seconds: float) -> Iterator[dict]:
    """The measurements, one kind after the other."""
    for name, (side, size, count) in IMAGES.items():
        raws = [picture(side, i) for i in range(16)]
        samples = ({"__key__": f"{i:06d}", "jpg": raws[i % 16], "txt": TEXT} for i in range(count))
        shards = write_shards(samples, folder / f"{side}-{size}", "s", 32)
        to_tensor = v2.Compose([
            v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]),
        ])  # fmt: skip
        stages = [webdataset.decode("pil"), webdataset.to_tuple("jpg", "txt"), webdataset.map_tuple(to_tensor, str)]
        work = raws, lambda raw, size=size: resize_and_crop(decode(raw), (size, size))[0]
        yield measure(f"images {name}", shards, ("image", "caption"), size, work, stages, seconds)
    encoded = [latent(i) for i in range(16)]
    shards = write_shards(({"__key__": f"{i:06d}"} | encoded[i % 16] for i in range(512)), folder / "latents", "s", 128)
    raws = [sample["safetensors"] for sample in encoded]
    stages = [
        webdataset.to_tuple("safetensors", "txt", "json"),
        webdataset.map_tuple(safetensors.torch.load, lambda raw: raw.decode(), json.loads),
        webdataset.map(lambda sample: (*sample[0].values(), *sample[1:])),
    ]
    work = raws, lambda raw: torch.stack([*unpack_tensors(raw, frozenset(["latents"])).values()])
    yield measure("latents", shards, ("latents", "caption"), 1024, work, stages, seconds)
    captions = ({"__key__": f"{i:06d}", "txt": f"{TEXT} {i}"} for i in range(4096))
    shards = write_shards(captions, folder / "captions", "s", 1024)
    stages = [webdataset.decode(), webdataset.to_tuple("txt")]
    work = [TEXT.encode()] * 64, clean_caption
    yield measure("captions", shards, ("caption",), 1024, work, stages, seconds)


def tiny_shards(folder: Path, count: int) -> None:
    """Shards of four samples, written as fast as can be."""
    raw = {"jpg": picture(16, 0), "txt": TEXT.encode(), "json": b'{"score": 5}'}
    for number in range(count):
        with tarfile.open(folder / f"s-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, (end, data) in itertools.product(range(4), raw.items()):
                info = tarfile.TarInfo(f"{number:06d}{sample}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def openings(folder: Path, count: int) -> Iterator[dict]:
    """Seconds to open so many shards."""
    tiny_shards(folder, count)
    for name, filters in (("plain", []), ("filtered", ["score >= 1", "width >= 8"])):
        keys, line = DataSettings(filters=filters).keys, {"open": name, "shards": count}
        for way in ("first", "indexes", "file"):
            if way == "indexes":
                for file in folder.glob(f"{PREFIX}*"):
                    file.unlink()
            began = time.perf_counter()
            line["samples"] = len(ShardDataset(expand(str(folder)), 16, **keys))
            line[way] = round(time.perf_counter() - began, 2)
        yield line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="per way of reading")
    parser.add_argument("--open", type=int, metavar="SHARDS", help="measure opening so many shards instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for line in openings(Path(folder), args.open) if args.open else run(Path(folder), args.seconds):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
