"""`disback shards --encode`: latents and text states of shards, computed once instead of in every training step."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.encoded import CAPTIONS_KEY, EXTENSION, RECORD_KEY, TENSORS, encoding_of, pack_tensors
from data.errors import DataError
from data.selected_rows import NothingSelectedError
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
    """This process's share of the shards: shard i belongs to rank i % size. The processes do not communicate; `size` are
    all of an array of jobs, if there is one."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_environment(cls, job: int = 0, jobs: int = 1) -> "Part":
        """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them, in one of several equal jobs. Raises UserError or
        NodeTrouble unless all processes of this one are there."""
        gpus = torch.cuda.device_count()
        rank, size, local = check_group("a GPU" if gpus else "cpu")
        rank, size = job * size + rank, jobs * size
        if not gpus:
            return cls(rank, size, torch.device("cpu"))
        device = torch.device("cuda", local % gpus)
        torch.cuda.set_device(device)  # some kernels start on the current GPU, whatever the tensors' GPU is
        return cls(rank, size, device)


class _Rows(Dataset):
    """A shard's samples by row; where captions have several sources, with all of them as "captions", the first of which is
    "caption". A SampleError or DataError is returned instead of raised: a loader process would wrap it in its
    traceback."""

    def __init__(self, dataset: ShardDataset, several: bool):
        self.dataset, self.several = dataset, several

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict | SampleError | DataError:
        try:
            sample = self.dataset.read(row)
            if not self.several:
                return sample
            captions = self.dataset.captions(row)
            return sample | {"captions": captions, "caption": next(iter(captions.values()))}
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
        """data: the resolution or buckets, which samples, and where images and captions are. precision: "bf16" or "fp32". Raises ModelError for a
        pipeline that is incomplete or does not fit the resolution."""
        selection = data.selection
        check_fit(check_pipeline(pipeline, variant), data.resolution, (), variant, selection.buckets)
        set_tf32(precision != "fp32")
        self.data, self.text = data, text
        self.several = isinstance(data.caption_field, dict) and len(data.caption_field) > 1
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.made_by = {
            "resolution": data.resolution,
            "vae": fingerprint(pipeline, "vae", variant),
            "text": fingerprint(pipeline, "text", variant) if text else None,
            "precision": precision,
            "captions": data.caption_source,
        }
        chosen = {
            "buckets": [list(size) for size in selection.buckets],
            "filters": data.filters,
            "min_size": data.min_size,
        }
        self.made_by |= {name: value for name, value in chosen.items() if value}
        self.sampler = Sampler.load(pipeline, data.size, self.dtype, device, variant)

    def tensors(self, samples: list[dict]) -> list[dict[str, Tensor]]:
        """Of samples of one size: latent_mean, latent_std [C, h, w] of each and with text also states [L, D] and pooled [P],
        for each of several captions as NAME/SOURCE, on the CPU."""
        device = self.sampler.text.device
        images = torch.stack([sample["image"] for sample in samples]).to(device)
        found = [{} for _ in samples]
        self._spread(
            found, dict(zip(TENSORS["latents"], self.sampler.posterior(images), strict=True)), range(len(samples))
        )
        sources = dict.fromkeys(source for sample in samples for source in sample.get("captions", ()))
        for source in sources if self.text and self.several else (None,) * self.text:
            rows = [row for row, sample in enumerate(samples) if source is None or source in sample["captions"]]
            texts = [samples[row]["caption"] if source is None else samples[row]["captions"][source] for row in rows]
            cond = self.sampler.text.encode(texts, samples[0]["size"])
            text = {"states": cond.states} | ({} if cond.pooled is None else {"pooled": cond.pooled})
            self._spread(found, {f"{name}/{source}" if source else name: value for name, value in text.items()}, rows)
        for sample, tensors in zip(samples, found, strict=True):
            for name, value in tensors.items():
                if not torch.isfinite(value).all():
                    raise RankError(f"{name} of {sample['key']} is not finite: use --precision fp32")
        return found

    def _spread(self, found: list[dict[str, Tensor]], batch: dict[str, Tensor], rows: Iterable[int]) -> None:
        """Puts the rows of a batch's tensors into the samples that they belong to."""
        for name, value in batch.items():
            for row, part in zip(rows, value.to(self.dtype).cpu(), strict=True):
                found[row][name] = part

    def samples(
        self, dataset: ShardDataset, batch: int, workers: int, progress: Progress, rejects: Counter
    ) -> Iterator[dict]:
        """A shard's samples, encoded, in the form that `write_shard` takes; broken ones are left out and counted."""
        batches = {"batch_size": batch} if not self.data.buckets else {"batch_sampler": _by_bucket(dataset, batch)}
        for read in DataLoader(_Rows(dataset, self.several), num_workers=workers, collate_fn=list, **batches):
            good = []
            for sample in read:
                if isinstance(sample, DataError):
                    raise sample
                if isinstance(sample, SampleError):
                    rejects[str(sample)] += 1
                else:
                    good.append(sample)
            for sample, tensors in zip(good, self.tensors(good) if good else (), strict=True):
                record = self.made_by | {"original_size": sample["original_size"], "crop": sample["crop"]}
                if self.several:
                    record[CAPTIONS_KEY] = sample["captions"]
                yield {
                    "__key__": sample["key"],
                    EXTENSION: pack_tensors(tensors),
                    "txt": sample["caption"],
                    "json": sample["meta"] | {RECORD_KEY: record},
                }
            progress.add(len(read))


def _by_bucket(dataset: ShardDataset, batch: int) -> list[list[int]]:
    """Rows in batches of one bucket each."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row in range(len(dataset)):
        rows.setdefault(dataset.size(row), []).append(row)
    return [part[first : first + batch] for part in rows.values() for first in range(0, len(part), batch)]


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
        rejects = _encode_shard(path, out / path.name, encoding, progress, batch, workers)
        progress.print(f"{out / path.name}: shard {number} of {len(missing)}; left out: {dict(rejects) or 'none'}")


def _encode_shard(
    path: Path, final: Path, encoding: Encoding, progress: Progress, batch: int, workers: int
) -> Counter[str]:
    """Returns the samples that were left out by reason. Raises RankError if the written shard lacks others."""
    data, usable, rejects = encoding.data, 0, Counter()
    broken: Counter[str] = Counter()
    try:
        dataset = ShardDataset([path], data.resolution, ("image", "caption", "meta"), 0, **data.keys)
    except NothingSelectedError as nothing:
        write_shard([], final)
        rejects = nothing.rejected
    else:
        usable, rejects = len(dataset), dataset.rejected
        try:
            write_shard(encoding.samples(dataset, batch, workers, progress, broken), final)
        finally:
            dataset.close()
    written = len(load_index(final))
    if written + broken.total() != usable:
        raise RankError(
            f"{final} has {written} of {usable} samples ({dict(broken)} left out): remove it, and run again"
        )
    return rejects + broken


def _exists(tar: Path, encoding: Encoding) -> bool:
    if not tar.exists() or not len(load_index(tar)):  # empty: no sample of its source was usable
        return False
    record = encoding_of(load_index(tar))
    if record == encoding.made_by:
        return True
    keys = encoding.made_by | (record or {})
    wrong = [key for key in keys if not record or record.get(key) != encoding.made_by.get(key)]
    raise RankError(f"{tar} exists and was encoded with another {', '.join(wrong)}: choose another --out, or remove it")
