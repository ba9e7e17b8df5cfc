"""A training stage: what pretraining, recording and backtracking add to the one loop, and what they share."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from data.loader import Batch, Batches
from data.sampling_order import BatchSplit
from models.conditioning import Conditioning
from models.sampler import Sampler
from trainer.config.deepspeed import micro_batch
from trainer.config.schema import TrainSettings
from trainer.distributed.logs import log
from trainer.distributed.world import mean_over_ranks, sum_over_ranks
from trainer.engine.optimizer import learning_rate
from trainer.engine.role import Role, skipped_updates
from trainer.engine.save_weights import Snapshot
from trainer.training.inputs import choose_inputs, offload_unused, text_conditioning
from trainer.training.metrics import Meters
from trainer.training.roles import RoleBuilder
from trainer.training.run import Run


class StatePart(Protocol):
    """Something of a stage that a checkpoint must hold on every rank."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """The state to load on this rank, from those of all ranks of a run that was split in another way."""


class Stage(ABC):
    """The base of every stage. A subclass builds its roles in `__init__` and trains them in `update`.

    name: of the stage's folder. split: how a step's batch is cut into ranks and micro-batches. roles: by name; those with
    an optimizer go into checkpoints. parts: what else goes there. update_every: steps per update, of roles that are not
    updated at every step. identity: what a resumed run must have in common with the saved one. flops: counted FLOP per
    step and rank, 0 if unknown.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        settings: TrainSettings,
        images: bool,
        pipeline: Path | None,
        section: str | None = None,
    ):
        """images: whether the stage trains on images. pipeline: the folder whose text encoders, autoencoder and schedule it
        uses; None for a stage that trains the autoencoder itself. section: of the settings, if that is not the name."""
        self.name, self.run, self.world, self.settings = name, run, run.world, settings
        self.steps, self.batch = settings.steps, settings.batch
        self.micro = micro_batch(settings.batch, settings.accumulation, run.world.size, section or name)
        self.split = BatchSplit(run.world.size, self.micro, settings.accumulation)
        self.inputs = choose_inputs(run, images, pipeline)
        self.dataset = run.dataset("train", self.inputs)
        self.batches: Batches | None = None
        self.noise = run.noise(name)
        self.meters, self.skipped = Meters(), Counter()
        self.roles: dict[str, Role] = {}
        self.parts: dict[str, StatePart] = {}
        self.update_every: dict[str, int] = {}
        self.flops = 0.0
        self.identity = self._identity()
        if self.dataset.rejected:
            log.warning(f"{name}: left out of the shards: {dict(self.dataset.rejected)}")
        if pipeline:
            self.sampler: Sampler = run.sampler(pipeline)
            offload_unused(self.sampler, self.inputs)
            self.schedule = self.sampler.schedule
            self.builder = RoleBuilder(name, run, settings, self.micro, self.sampler)

    def _identity(self) -> dict:
        # These may differ between a run and its resumption: how long it trains, what it shows, and how it is spread over
        # processes and network calls.
        spread = {"loop", "steps", "accumulation", "generator_split", "guidance_batch"}
        private = self.settings.model_dump(mode="json", exclude=spread)
        identity = {f"{self.name}.{k}": v for k, v in private.items() if not k.endswith("ds_config")}
        identity |= {"timestep_shift": self.run.settings.timestep_shift, "seed": self.run.settings.seed}
        identity |= {"precision": self.run.settings.precision, "samples": len(self.dataset)}
        if cached := [what for what in self.inputs if what in ("latents", "text")]:
            log.info(f"{self.name}: reads encoded {' and '.join(cached)} from the shards")
            identity["data.cached"] = [*cached, self.dataset.encoding]
        return identity

    def add_role(self, role: Role) -> Role:
        """Puts a role into `roles`; an adapter's base becomes part of the stage's identity."""
        self.roles[role.name] = role
        if role.base:
            self.identity |= {"lora": self.run.settings.lora.identity(), f"{role.name}.base": role.base}
        return role

    # Hooks. Every rank calls each of them.

    @abstractmethod
    def update(self, step: int) -> None:
        """One training step, counted from 0. Never waits for the device."""

    def begin(self, step: int) -> None:
        """Called once before training, after a resume: opens the data at a step."""
        workers = self.run.settings.data.workers
        self.batches = Batches(self.dataset, self.split, self.world.rank, step, workers, self.read_every)

    @property
    def read_every(self) -> int:
        """Only every n-th step reads samples; see `Batches`."""
        return 1

    def announces(self, step: int) -> bool:
        """Whether the metrics must have a line at this step in any case (a target switch)."""
        return False

    def values(self, step: int) -> dict:
        """Values for a metrics line that the host knows, besides the learning rates."""
        return {}

    def preview(self) -> Tensor | None:
        """A uint8 grid [3, H, W] of samples."""
        return None

    def snapshot(self) -> Snapshot | None:
        """The weights in a checkpoint that an evaluation reads; None for none, and on other ranks than 0."""
        return None

    @property
    def needs(self) -> Sequence[str]:
        """Files outside of a checkpoint, written so far, that resuming from this step needs."""
        return ()

    def after_save(self, needed: set[str]) -> None:
        """Called when a checkpoint is safe on disk. needed: the `needs` of all that are kept (rank 0)."""
        return

    def close(self) -> None:
        """Ends loader processes and threads."""
        if self.batches:
            self.batches.close()
        self.dataset.close()
        if hasattr(self, "builder"):
            self.builder.close()

    # What subclasses use.

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate of every trained role at a step."""
        return {name: learning_rate(role.settings, step, self.steps) for name, role in self.trained.items()}

    @property
    def trained(self) -> dict[str, Role]:
        return {name: role for name, role in self.roles.items() if role.trained}

    def keep_norms(self, steps_to_line: int) -> None:
        """Has each role keep the gradient norm of its last update before a metrics line; other norms are not computed."""
        for name, role in self.trained.items():
            role.keep_norm = steps_to_line < self.update_every.get(name, 1)

    def micro_batches(self) -> Iterator[Batch]:
        """The micro-batches of one step; the time spent waiting for them is metered."""
        for _ in range(self.settings.accumulation):
            began = time.monotonic()
            batch = next(self.batches)
            self.meters.add("data_seconds", time.monotonic() - began)
            self.skipped.update(batch.skipped)
            yield batch

    def encode(self, batch: Batch, time_ids: Tensor | None = None) -> Conditioning:
        """Conditioning of a batch's captions or of their encoded text. time_ids: default: uncropped square images."""
        time_ids = self.sampler.resolution if time_ids is None else time_ids
        return text_conditioning(batch.captions, batch.cached, self.sampler, self.run.dtype, time_ids)

    # What the loop uses.

    def line(self, step: int) -> dict:
        """Learning rates and what else the host knows of a step."""
        return {f"lr/{name}": rate for name, rate in self.rates(step).items()} | self.values(step)

    def measured(self) -> dict:
        """Gradient norms, skipped samples and updates so far over all ranks, and how far weights moved since the last
        line. Waits for the device."""
        count = torch.tensor([float(sum(self.skipped.values()))], device=self.world.device)
        values = {"skipped_samples": int(sum_over_ranks(count, self.world)), "skipped_updates": self.skipped_updates()}
        ratios = torch.stack([role.update_ratio() for role in self.trained.values()])
        ratios = mean_over_ranks(ratios, self.world).tolist()
        for (name, role), ratio in zip(self.trained.items(), ratios, strict=True):
            values[f"grad_norm/{name}"] = None if role.last_norm is None else float(role.last_norm)
            values[f"update_ratio/{name}"] = ratio if ratio == ratio else None  # NaN: nothing to compare with
        return values

    def skipped_updates(self) -> int:
        return skipped_updates(self.roles)

    def state_dict(self) -> dict:
        """This rank's own state; engines are saved by the checkpoint."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        watched = {name: role.watch_state() for name, role in self.trained.items()}
        return {"skipped": dict(self.skipped), "meters": self.meters.state_dict(), "watched": watched, "parts": parts}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = Counter(state["skipped"])
        self.meters.load_state_dict(state["meters"])
        for name, watched in state["watched"].items():
            self.roles[name].load_watch_state(watched)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

    def regroup(self, states: list[dict], saved: BatchSplit) -> dict:
        """The state to load on this rank, from those of all ranks of a run that was split in another way. The engines are
        loaded already."""
        skipped = Counter()
        for state in states if self.world.main else ():  # the metrics sum over ranks
            skipped.update(state["skipped"])
        # The weights that an update ratio compares with may be another rank's now: the next line has none.
        watched = {name: watch | {"probe": None} for name, watch in states[0]["watched"].items()}
        parts = {name: part.regroup([s["parts"][name] for s in states], saved) for name, part in self.parts.items()}
        meters = Meters.regrouped([s["meters"] for s in states], saved, self.split)
        return {"skipped": dict(skipped), "meters": meters, "watched": watched, "parts": parts}
