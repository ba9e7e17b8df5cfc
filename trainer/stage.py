"""What the training stages share besides the loop: data, text states, noise, counts."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.utils import make_grid

from data.batches import Batch, Batches
from models.lora import attach
from models.pipeline import load_unet, weights_hash
from models.sampler import image_noise
from trainer.distributed import mean_over_ranks, sum_over_ranks
from trainer.engines import Role, deepspeed_config, micro_batch
from trainer.run import Run
from trainer.schedules import OptimizerSettings
from trainer.settings import TrainSettings
from trainer.telemetry import Meters, log
from trainer.weights import save_adapter, save_folder, start_from

PREVIEW = 32


class TrainStage:
    """The base of pretraining, recording and backtracking; see trainer.loop.Stage for the contract."""

    flops = 0.0

    def __init__(self, name: str, run: Run, settings: TrainSettings, images: bool, where: str | None = None):
        self.name, self.run, self.world, self.settings = name, run, run.world, settings
        self.steps, self.batch = settings.steps, settings.batch
        self.micro = micro_batch(settings.batch, settings.accumulation, run.world, where or name)
        self.dataset = run.dataset("train", ("image", "caption") if images else ("caption",))
        if self.dataset.rejected:
            log.warning(f"{name}: left out of the shards: {dict(self.dataset.rejected)}")
        self.noise = run.noise(name)
        self.skipped = Counter()
        self.roles: dict[str, Role] = {}
        self.bases: dict[str, str] = {}  # of roles that are adapters: the sha256 of the network below
        self._hashes: dict[Path, str] = {}
        # What may differ between a run and its resumption: how long it trains and what it shows.
        private = settings.model_dump(mode="json", exclude={"loop", "steps"})
        self.identity = {f"{name}.{k}": v for k, v in private.items()}
        self.identity |= {"seed": run.settings.seed, "precision": run.settings.precision, "samples": len(self.dataset)}

    def role(
        self,
        name: str,
        folder: Path,
        ds_config: str,
        optimizer: OptimizerSettings | None = None,
        adapter: Path | Literal["new"] | None = None,
    ) -> Role:
        """The network of a weights folder as a role under DeepSpeed: trained with an optimizer's settings, frozen
        without. adapter: a LoRA folder to go on from, or "new", makes the role a LoRA adapter on that network."""
        settings, clip = self.settings, self.settings.clip if optimizer else 0.0
        precision = self.run.settings.precision
        config = deepspeed_config(ds_config, self.micro, settings.accumulation, clip, precision, self.world)
        # A frozen base needs no float32 copy; a network that is trained is loaded as exactly as it is stored.
        network = load_unet(folder, self.run.dtype if adapter else torch.float32)
        if adapter:
            attach(network, self.run.settings.lora, f"{self.run.settings.seed}/{self.name}/{name}")
            if adapter != "new":
                start_from(network, adapter, self.world)
            self.bases[name] = self.hash(folder)
            self.identity["lora"] = self.run.settings.lora.identity()
            self.identity[f"{name}.base"] = self.bases[name]
        self.roles[name] = role = Role(name, network, config, self.world, optimizer)
        return role

    @property
    def trained_passes(self) -> int:
        """Forward passes that a trained pass costs: itself, gradients on activations and, unless they are a LoRA's few,
        on weights."""
        return 2 if self.run.settings.lora.rank else 3

    def hash(self, folder: Path) -> str:
        """The sha256 of a weights folder, read once."""
        if folder not in self._hashes:
            self._hashes[folder] = weights_hash(folder)
        return self._hashes[folder]

    def save_weights(self, role: Role, folder: Path, dtype: torch.dtype) -> None:
        """Writes a role's weights as a UNet folder, or as a LoRA folder if it is an adapter. Every rank calls it."""
        state = role.state_dict()
        if state is None:
            return
        if role.adapter:
            save_adapter(state, role.module, folder, dtype, self.bases[role.name])
        else:
            save_folder(state, role.config, folder, dtype)

    def begin(self, step: int) -> None:
        """Opens the data at a step."""
        world, workers = self.world, self.run.settings.data.workers
        self.batches = Batches(
            self.dataset, world.rank, world.size, self.micro, self.settings.accumulation, step, workers
        )

    def micro_batches(self, meters: Meters) -> Iterator[Batch]:
        """The micro-batches of one step; the time spent waiting for them is metered."""
        for _ in range(self.settings.accumulation):
            began = time.monotonic()
            batch = next(self.batches)
            meters.add("data_seconds", time.monotonic() - began)
            self.skipped.update(batch.skipped)
            yield batch

    def preview_captions(self) -> list[str]:
        """Captions of the sample grids: the configured prompts, else the first ones of the shards."""
        prompts = self.run.settings.sample.prompts
        if prompts:
            return [prompts[i % len(prompts)] for i in range(PREVIEW)]
        return [self.dataset[i % len(self.dataset)]["caption"] for i in range(PREVIEW)]

    def preview_noise(self, shape: tuple[int, int, int]) -> Tensor:
        return image_noise(self.run.settings.seed, list(range(PREVIEW)), shape, self.world.device)

    def grid(self, images: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] to one grid [3, H', W'], small images enlarged without smoothing."""
        return make_grid(enlarge(images, self.run.settings.sample.enlarge), nrow=8, padding=2, pad_value=128)

    def metrics(self) -> dict:
        """Skipped samples and updates so far over all ranks, and how far the weights moved since the last line. Every
        rank calls it."""
        count = torch.tensor([float(sum(self.skipped.values()))], device=self.world.device)
        values = {"skipped_samples": int(sum_over_ranks(count, self.world))}
        trained = {name: role for name, role in self.roles.items() if role.trained}
        values["skipped_updates"] = sum(role.skipped_updates() for role in trained.values())
        ratios = torch.stack([role.update_ratio() for role in trained.values()])
        ratios = mean_over_ranks(ratios, self.world).tolist()
        return values | {f"update_ratio/{name}": ratio for name, ratio in zip(trained, ratios, strict=True)}

    def preview(self) -> Tensor | None:
        return None

    def weights_writer(self) -> Callable[[Path], None] | None:
        return None

    def state_dict(self) -> dict:
        watched = {name: role.watch_state() for name, role in self.roles.items() if role.trained}
        return {"skipped": dict(self.skipped), "watched": watched}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = Counter(state["skipped"])
        for name, watched in state["watched"].items():
            self.roles[name].load_watch_state(watched)

    def saved(self) -> None:
        pass

    def close(self) -> None:
        if hasattr(self, "batches"):
            self.batches.close()
        self.dataset.close()


def enlarge(images: Tensor, factor: int) -> Tensor:
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3) if factor > 1 else images
