"""Throughput of encoded shards against decoding, autoencoder and text encoders, in samples per second.

    python -m benchmarks.cached [--seconds 5]

The miniature at 8 px, both in turn; then plain reading of samples as large as SDXL's at 1024 px.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data.digits import build_digits
from data.encoded import EXTENSION, RECORD_KEY, pack_tensors
from data.loader import Batches
from data.sampling_order import BatchSplit
from data.settings import DataSettings
from data.shard_dataset import ShardDataset
from data.shard_patterns import expand
from data.shard_writer import write_shards
from models.miniature import build_miniature
from models.sampler import Sampler
from models.settings import MiniatureSettings
from trainer.encode import Encoding, Part, encode_shards
from trainer.training.inputs import batch_latents, text_conditioning

BATCH, ROUNDS = 8, 5


def rate(work: Callable[[], object], seconds: float) -> float:
    """Samples per second of calls that take one batch each."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or not count:
        work()
        count += BATCH
    return count / spent


def work(shards: Path, want: tuple[str, ...], sampler: Sampler) -> Callable[[], object]:
    batches = Batches(ShardDataset(expand(str(shards)), 8, want), BatchSplit(1, BATCH), 0)
    eps = torch.zeros(BATCH, *sampler.latent_shape)

    def one() -> None:
        batch = next(batches)
        batch_latents(batch, sampler, eps)
        text_conditioning(batch.captions, batch.cached, sampler, torch.float32, 8)

    return one


def as_large_as_sdxl() -> Iterator[dict]:
    latents, text = torch.randn(4, 128, 128).bfloat16(), torch.randn(77, 2048).bfloat16()
    tensors = {"latent_mean": latents, "latent_std": latents, "states": text, "pooled": torch.randn(1280).bfloat16()}
    record = {RECORD_KEY: {"resolution": 1024, "original_size": (1024, 1024), "crop": (0, 0)}}
    for i in range(256):
        yield {"__key__": f"{i}", EXTENSION: pack_tensors(tensors), "txt": "a caption", "json": record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root, part = Path(name), Part(0, 1, torch.device("cpu"))
        build_digits(root / "digits")
        build_miniature(MiniatureSettings()).save_pretrained(root / "pipeline")
        plain, full = root / "digits" / "train-*.tar", root / "full"
        encoding = Encoding(root / "pipeline", DataSettings(resolution=8), True, "fp32", "", part.device)
        began = time.perf_counter()
        encode_shards(expand(str(plain)), full, encoding, part, BATCH, 0)
        print(f"encoded once in {time.perf_counter() - began:.1f} s")
        ways = {
            "decode, autoencoder, text": work(plain, ("image", "caption"), encoding.sampler),
            "encoded shards": work(full, ("caption", "latents", "text"), encoding.sampler),
        }
        found = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, one in ways.items():
                found[way].append(rate(one, args.seconds))
        for way, rates in found.items():
            print(f"{way:28}{statistics.median(rates):10.0f} samples/s")
        write_shards(as_large_as_sdxl(), root / "large", "s")
        large = Batches(
            ShardDataset(expand(str(root / "large")), 1024, ("caption", "latents", "text")), BatchSplit(1, BATCH), 0
        )
        size = next((root / "large").glob("*.tar")).stat().st_size / 256
        print(
            f"{'read, as large as SDXL':28}{rate(lambda: next(large), args.seconds):10.0f} samples/s of {size / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()
