"""`disback shards --encode`: latents and text states of shards, computed once instead of in every training step."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.encoded import EXTENSION, RECORD_KEY, encoding_of, pack_tensors
from data.errors import DataError
from data.settings import DataSettings
from data.shard_dataset import SampleError, ShardDataset
from data.shard_index import load_index
from data.shard_writer import write_shard
from models.compile import set_tf32
from models.sampler import Sampler
from models.validate import check_fit, check_pipeline
from trainer.distributed.logs import duration
from trainer.distributed.rendezvous import check_group
from trainer.errors import RankError, UserError
from trainer.training.inputs import fingerprint

PROGRESS_SECONDS = 10.0  # between progress lines


@dataclass(frozen=True)
class Part:
    """This process's share of the shards: shard i belongs to rank i % size. The processes do not communicate."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_environment(cls) -> "Part":
        """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them. Raises UserError or NodeTrouble unless all processes are
        there."""
        gpus = torch.cuda.device_count()
        rank, size, local = check_group("a GPU" if gpus else "cpu")
        if not gpus:
            return cls(rank, size, torch.device("cpu"))
        device = torch.device("cuda", local % gpus)
        torch.cuda.set_device(device)  # some kernels start on the current GPU, whatever the tensors' GPU is
        return cls(rank, size, device)


class _Rows(Dataset):
    """A shard's samples by row. A SampleError or DataError is returned instead of raised: a loader process would wrap it in its
    traceback."""

    def __init__(self, dataset: ShardDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict | SampleError | DataError:
        try:
            return self.dataset.read(row)
        except (SampleError, DataError) as error:
            return error


class Progress:
    """Progress lines with the time remaining, for this process's samples."""

    def __init__(self, total: int, part: Part):
        self.total, self.done = total, 0
        self.who = f"rank {part.rank}: " if part.size > 1 else ""
        self.began = self.printed = time.monotonic()

    def add(self, samples: int) -> None:
        self.done += samples
        if time.monotonic() - self.printed >= PROGRESS_SECONDS:
            self.printed = time.monotonic()
            rate = self.done / (self.printed - self.began)
            remaining = (self.total - self.done) / rate
            self.print(f"{self.done} of {self.total} samples, {rate:.1f} per second, {duration(remaining)} left")

    def print(self, line: str) -> None:
        print(self.who + line, flush=True)


class Encoding:
    """Encodes shards with the autoencoder and text encoders of a pipeline folder.

    The autoencoder computes in float32; the text encoders compute, and everything is stored, in `precision`.
    """

    def __init__(
        self,
        pipeline: Path,
        data: DataSettings,
        text: bool,
        precision: str,
        variant: str,
        device: torch.device,
    ):
        """data: the resolution, and where images and captions are. precision: "bf16" or "fp32". Raises ModelError for a
        pipeline that is incomplete or does not fit the resolution."""
        resolution = data.resolution
        check_fit(check_pipeline(pipeline, variant), resolution, (), variant)
        set_tf32(precision != "fp32")
        self.data, self.resolution, self.text = data, resolution, text
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.made_by = {
            "resolution": resolution,
            "vae": fingerprint(pipeline, "vae", variant),
            "text": fingerprint(pipeline, "text", variant) if text else None,
            "precision": precision,
            "captions": data.caption_source,
        }
        self.sampler = Sampler.load(pipeline, resolution, self.dtype, device, variant)

    def tensors(self, samples: list[dict]) -> dict[str, Tensor]:
        """latent_mean, latent_std [B, C, h, w] and with text also states [B, L, D] and pooled [B, P], on the CPU."""
        device = self.sampler.text.device
        images = torch.stack([sample["image"] for sample in samples]).to(device)
        found = dict(zip(("latent_mean", "latent_std"), self.sampler.posterior(images), strict=True))
        if self.text:
            cond = self.sampler.text.encode([sample["caption"] for sample in samples], self.resolution)
            found |= {"states": cond.states} | ({} if cond.pooled is None else {"pooled": cond.pooled})
        for name, value in found.items():
            if not torch.isfinite(value).all():
                raise RankError(f"{name} of {samples[0]['key']} or its neighbours is not finite: use --precision fp32")
        return {name: value.to(self.dtype).cpu() for name, value in found.items()}

    def samples(
        self, dataset: ShardDataset, batch: int, workers: int, progress: Progress, rejects: Counter
    ) -> Iterator[dict]:
        """A shard's samples, encoded, in the form that `write_shard` takes; broken ones are left out and counted."""
        for read in DataLoader(_Rows(dataset), batch, num_workers=workers, collate_fn=list):
            good = []
            for sample in read:
                if isinstance(sample, DataError):
                    raise sample
                if isinstance(sample, SampleError):
                    rejects[str(sample)] += 1
                else:
                    good.append(sample)
            if good:
                tensors = self.tensors(good)
                for row, sample in enumerate(good):
                    record = self.made_by | {"original_size": sample["original_size"], "crop": sample["crop"]}
                    yield {
                        "__key__": sample["key"],
                        EXTENSION: pack_tensors({name: value[row] for name, value in tensors.items()}),
                        "txt": sample["caption"],
                        "json": sample["meta"] | {RECORD_KEY: record},
                    }
            progress.add(len(read))


def encode_shards(paths: list[Path], out: Path, encoding: Encoding, part: Part, batch: int, workers: int) -> None:
    """Writes out/NAME.tar, encoded, for this process's share of the shards `paths`; skips shards that exist and were
    encoded by the same networks.

    Raises UserError if two shards share a name or if an existing shard was encoded by other networks; DataError for a
    shard that cannot be read or written.
    """
    if twice := [name for name, count in Counter(path.name for path in paths).items() if count > 1]:
        raise UserError(
            f"--encode: two shards are named {twice[0]} and would overwrite each other in {out}: encode them into two folders"
        )
    if any(path.resolve().parent == out.resolve() for path in paths):
        raise UserError(f"--out {out} holds the shards themselves: choose another folder")
    empty = [path for path in paths[part.rank :: part.size] if not len(load_index(path))]
    mine = [path for path in paths[part.rank :: part.size] if path not in empty]
    missing = [path for path in mine if not _exists(out / path.name, encoding)]
    progress = Progress(sum(len(load_index(path)) for path in missing), part)
    if len(missing) < len(mine):
        progress.print(f"{len(mine) - len(missing)} of {len(mine)} shards already exist")
    if empty:
        progress.print(f"skips {len(empty)} empty shards: {', '.join(path.name for path in empty)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be created: {error.strerror}: choose another folder") from error
    for number, path in enumerate(missing, 1):
        dataset = ShardDataset([path], encoding.resolution, ("image", "caption", "meta"), 0, **encoding.data.keys)
        rejects = Counter(dataset.rejected)
        try:
            write_shard(encoding.samples(dataset, batch, workers, progress, rejects), out / path.name)
        finally:
            dataset.close()
        progress.print(f"{out / path.name}: shard {number} of {len(missing)}; left out: {dict(rejects) or 'none'}")


def _exists(tar: Path, encoding: Encoding) -> bool:
    if not tar.exists() or not len(load_index(tar)):  # empty: no sample of its source was usable
        return False
    record = encoding_of(load_index(tar))
    if record == encoding.made_by:
        return True
    wrong = [key for key, value in encoding.made_by.items() if not record or record[key] != value]
    raise RankError(f"{tar} exists and was encoded with another {', '.join(wrong)}: choose another --out, or remove it")
