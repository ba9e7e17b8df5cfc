"""A training stage: what pretraining, recording and backtracking add to the one loop, and what they share."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.loader import Batch, Batches
from data.rejects import RETRIED, check_rejects, samples_lost
from data.sampling_order import BatchSplit
from data.settings import DataSettings
from data.sources import open_batches
from data.streams import StreamDataset
from models.compile import set_deterministic, set_tf32
from models.conditioning import Conditioning
from models.profile import pass_flops
from models.sampler import ImageNoise
from models.text_encoder import Size
from trainer.config.deepspeed import micro_batch
from trainer.config.schema import RunSettings, TrainSettings
from trainer.distributed.logs import log
from trainer.distributed.world import mean_over_ranks, sum_over_ranks
from trainer.engine.optimizer import learning_rate
from trainer.engine.role import Role
from trainer.engine.save_weights import Snapshot
from trainer.training.device_batches import DeviceBatches, on_device
from trainer.training.inputs import choose_inputs, offload_unused
from trainer.training.metrics import Meters
from trainer.training.preview import preview_grid
from trainer.training.roles import RoleBuilder
from trainer.training.run import Run
from trainer.training.shard_files import prepare_shards
from trainer.training.state_parts import RoleWatch, SampleCounts, StatePart
from trainer.training.trackers import check_trackers


class Stage(ABC):
    """The base of every stage. A subclass builds its roles in `__init__` and trains them in `update`.

    name: of the stage's folder. split: of a step's batch into ranks and micro-batches. local_batch: samples per step on
    this rank. roles: by name; checkpoints hold those with an optimizer. parts: what else checkpoints hold. update_every:
    steps per update, of roles that are not updated in every step. identity: what a resumed run must have in common with
    the saved one. flops: counted FLOP per step on this rank, 0 if unknown.
    """

    def __init__(self, name: str, run: Run, settings: TrainSettings, inputs: tuple[str, ...], section: str = ""):
        """inputs: what the stage reads from its shards. section: of the settings, if that is not the name."""
        check_trackers(settings.loop.trackers)
        self.name, self.run, self.world, self.settings = name, run, run.world, settings
        self.steps, self.batch = settings.steps, settings.batch
        self.micro = micro_batch(settings.batch, settings.accumulation, run.world.size, section or name)
        self.split = BatchSplit(run.world.size, self.micro, settings.accumulation)
        self.local_batch = self.micro * settings.accumulation
        prepare_shards(run, "train")
        self.inputs, self.dataset = inputs, run.dataset("train", inputs, settings.batch)
        self.batches: Batches | DeviceBatches | None = None
        self.used, self.lost = 0, Counter()  # samples that this process has read, and skipped by reason
        self.noise = run.noise(name)
        self.meters, self.counts = Meters(self.split), SampleCounts(run.world)
        self.roles: dict[str, Role] = {}
        self.parts: dict[str, StatePart] = {"meters": self.meters, "skipped": self.counts}
        self.update_every: dict[str, int] = {}
        self.flops = 0.0
        self.forwards = 0.0
        self.identity = self._identity()
        set_tf32(run.settings.network.tf32)
        set_deterministic(run.settings.network.deterministic)
        if self.dataset.rejected:
            log.warning(f"{name}: skips samples of data.train: {dict(self.dataset.rejected)}")
            check_rejects(len(self.dataset), self.dataset.rejected, run.settings.data.max_rejected)

    def _identity(self) -> dict:
        # These may change between a run and its resumption: how long it trains, what it shows, and how it is spread over
        # processes and network calls.
        may_change = {"loop", "steps", "accumulation", "generator_split", "guidance_batch", "save_raw", "settle"}
        fixed = self.settings.model_dump(mode="json", exclude=may_change)
        if not fixed.get("ema_warmup", True):  # runs of earlier versions do not have it
            del fixed["ema_warmup"]
        identity = {f"{self.name}.{k}": v for k, v in fixed.items() if not k.endswith("ds_config")}
        identity |= {"timestep_shift": self.run.settings.timestep_shift, "seed": self.run.settings.seed}
        identity |= {"precision": self.run.settings.precision, "samples": len(self.dataset)}
        if self.run.settings.network.grad_accum_dtype != "auto":  # another optimizer of DeepSpeed's, with other files
            identity["network.grad_accum_dtype"] = self.run.settings.network.grad_accum_dtype
        identity |= self._selection()
        if encoded := [what for what in self.inputs if what in ("latents", "text")]:
            log.info(f"{self.name}: reads encoded {' and '.join(encoded)} from the shards")
            identity["data.cached"] = [*encoded, self.dataset.encoding]
        return identity

    def _selection(self) -> dict:
        """What decides which samples a step has, and how they are cut, as far as it is set."""
        data, plain = self.run.settings.data, DataSettings()
        names = ("min_size", "filters", "crop", "flip", "weights")
        chosen = {f"data.{name}": getattr(data, name) for name in names if getattr(data, name) != getattr(plain, name)}
        if data.buckets:
            chosen["data.buckets"] = [list(shape) for shape in data.shapes]
            counts = ", ".join(
                f"{h} x {w}: {n}" for (h, w), n in zip(data.shapes, self.dataset.counts, strict=True) if n
            )
            log.info(f"{self.name}: samples by bucket (height x width): {counts}")
        if isinstance(data.caption_field, dict):
            chosen["data.caption_field"] = data.caption_field
        return chosen

    def add_role(self, role: Role) -> Role:
        """Adds a role to `roles`; the base of an adapter becomes part of the identity."""
        self.roles[role.name] = role
        if role.trained:
            self.parts[f"watch {role.name}"] = RoleWatch(role)
        if role.base:
            self.identity |= {"lora": self.run.settings.lora.identity(), f"{role.name}.base": role.base}
        return role

    # Hooks for subclasses. Every rank calls each of them.

    @abstractmethod
    def update(self, step: int) -> None:
        """One training step, counted from 0. Should not wait for the device."""

    def begin(self, step: int) -> None:
        """Called once before training, after a resume: opens the data at a step."""
        workers = self.run.settings.data.workers
        batches = open_batches(self.dataset, self.split, self.world.rank, step, workers, self.read_every)
        self.batches = on_device(batches, self.world.device)
        if isinstance(self.dataset, StreamDataset):
            log.info(
                f"{self.name}: data.train is streamed: shards are drawn at random, and a resumed run goes on with other samples "
                "than an uninterrupted one, though always with the same ones (data.cache_dir makes it exact)"
            )

    @property
    def read_every(self) -> int:
        """Only every n-th step reads samples; see data.loader.Batches."""
        return 1

    def may_end(self, step: int) -> bool:
        """Whether `ended` may become true by the update that finishes step number `step`."""
        return False

    @property
    def ended(self) -> bool:
        """Whether training has ended before its last step; the same on every rank."""
        return False

    def epoch(self, step: int) -> float | None:
        """How often the samples of data.train were gone through after `step` steps; the same on every rank, since its
        position is a function of the step. None for a stream, which has no epochs."""
        return None if isinstance(self.dataset, StreamDataset) else step * self.batch / len(self.dataset)

    def announces(self, step: int) -> bool:
        """Whether a step off the logging interval gets a metrics line too (a target switch)."""
        return False

    def host_values(self, step: int) -> dict:
        """Values for the metrics that need no wait for the device."""
        return {f"lr/{name}": rate for name, rate in self.rates(step).items()}

    def preview(self) -> Tensor | None:
        """A uint8 grid [3, H, W] of samples."""
        return None

    def snapshots(self) -> dict[str, Callable[[], Snapshot | None]]:
        """The weights in a checkpoint that an evaluation reads, by folder, as functions that gather them (on rank 0; None on
        the others). Every rank must call them."""
        return {}

    @property
    def needs(self) -> Sequence[str]:
        """Files outside of a checkpoint, written so far, that resuming from this step needs."""
        return ()

    def after_save(self, needed: set[str]) -> None:
        """Called when a checkpoint is safe on disk. needed: the `needs` of all checkpoints that are kept (rank 0)."""
        return

    def close(self) -> None:
        """Ends loader processes and threads."""
        if self.batches:
            self.batches.close()
        self.dataset.close()

    # For subclasses and the loop.

    @property
    def trained(self) -> dict[str, Role]:
        return {name: role for name, role in self.roles.items() if role.trained}

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate of every trained role at a step."""
        return {name: learning_rate(role.settings, step, self.steps) for name, role in self.trained.items()}

    def compute(self, step: int) -> float | None:
        """Forward-equivalents of the first `step` steps: passes of the denoiser on a batch of `backtrack.batch` samples,
        where a backward pass counts twice. None for a stage without a denoiser."""
        if not self.forwards:
            return None
        return self.forwards * step * self.batch / self.run.settings.backtrack.batch

    def micro_batches(self) -> Iterator[Batch]:
        """The micro-batches of one step; the time spent waiting for them is metered."""
        for _ in range(self.settings.accumulation):
            began = time.monotonic()
            batch = next(self.batches)
            self.meters.add("data_seconds", time.monotonic() - began)
            self.counts.skipped.update(batch.skipped)
            self.lost.update(batch.skipped)
            self.used += len(batch.captions)
            check_rejects(self.used, self.lost, self.run.settings.data.max_rejected)
            yield batch

    def keep_norms(self, steps_to_line: int) -> None:
        """Has each role keep the gradient norm of its last update before a metrics line; other norms are not computed."""
        for name, role in self.trained.items():
            role.keep_norm = steps_to_line < self.update_every.get(name, 1)

    def device_values(self) -> dict:
        """Values for the metrics that wait for the device: means since the last line, gradient norms, skipped samples,
        truncated captions and skipped updates so far over all ranks, and how far weights moved since the last line."""
        values = self.meters.read(self.world)
        skipped = self.counts.skipped
        counts = [samples_lost(skipped), skipped[RETRIED], self.counts.truncated]
        names = "skipped_samples", "interrupted_reads", "truncated_captions"
        totals = sum_over_ranks(torch.tensor(counts, device=self.world.device), self.world).tolist()
        values |= dict(zip(names, totals, strict=True))
        values["skipped"] = self.counts.by_reason() if totals[0] else {}
        values["skipped_updates"] = sum(role.skipped_updates() for role in self.trained.values())
        ratios = torch.stack([role.update_ratio() for role in self.trained.values()])
        ratios = mean_over_ranks(ratios, self.world).tolist()
        for (name, role), ratio in zip(self.trained.items(), ratios, strict=True):
            values[f"grad_norm/{name}"] = None if role.last_norm is None else float(role.last_norm)
            values[f"update_ratio/{name}"] = ratio if ratio == ratio else None  # NaN: nothing to compare with
        return values

    def state_dict(self) -> dict:
        """This rank's own state; engines are saved by the checkpoint."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """The state to load on this rank, from those of all ranks of a run with another split or sharding. The engines are
        loaded already."""
        return {name: part.regroup([s[name] for s in states], saved) for name, part in self.parts.items()}


class DenoiserStage(Stage):
    """A stage that trains denoising networks, with the text encoders, autoencoder and schedule of a pipeline folder."""

    def __init__(self, name: str, run: Run, settings: TrainSettings, images: bool, pipeline: Path):
        """images: whether the stage trains on images, not only on captions."""
        super().__init__(name, run, settings, choose_inputs(run, images, pipeline))
        self.sampler = run.sampler(pipeline)
        offload_unused(self.sampler, self.inputs)
        self.schedule = self.sampler.schedule
        self.builder = RoleBuilder(name, run, settings, self.micro, self.sampler)

    def encode(self, batch: Batch, time_ids: Tensor | None = None) -> Conditioning:
        """Conditioning of a batch's captions or of their encoded text. time_ids: default: uncropped images."""
        time_ids = self.size(batch) if time_ids is None else time_ids
        if "states" not in batch.cached:
            self.counts.truncated += self.sampler.text.truncated(batch.captions)
        return self.sampler.text.encode_or_load(batch.captions, batch.cached, time_ids)

    def size(self, batch: Batch) -> Size:
        """Height and width in pixels of a batch's images, or of those that are generated for its captions."""
        return batch.size or self.sampler.size

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """(C, h, w) of the latents of these images."""
        return self.sampler.shape_of(self.size(batch))

    @property
    def shapes(self) -> dict[Size, float]:
        """The sizes that the stage trains in, with their shares of the samples."""
        shapes, counts = self.dataset.shapes, self.dataset.counts
        return {shape: n / len(self.dataset) for shape, n in zip(shapes, counts, strict=True) if n}

    def count_flops(self, per_sample: Callable[..., float], role: Role, gan: bool = False, lora: bool = True) -> None:
        """Sets `flops` and `forwards` by a function of trainer.planner.flops and a role's measured passes."""
        settings: RunSettings = self.run.settings
        adapters = {"lora": settings.lora} if lora else {}
        flops = forward = 0.0
        for size, share in self.shapes.items():
            cost = pass_flops(role.config, self.sampler.shape_of(size), self.sampler.text.tokens, gan, **adapters)
            flops, forward = flops + share * per_sample(settings, cost), forward + share * cost.forward
        self.flops, self.forwards = flops * self.local_batch, flops / forward

    def grid(self, make: Callable[[list[str], ImageNoise], Tensor]) -> Tensor:
        """The preview grid of `make`, which turns captions and noise into uint8 images [B, 3, H, W]."""
        return preview_grid(self.run, self.dataset, self.sampler, self.micro, make)

    def close(self) -> None:
        super().close()
        self.builder.close()
