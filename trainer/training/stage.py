"""What the training stages share besides the loop: data, text states, noise, counts."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from data.loader import Batch, Batches
from data.sampling_order import Split
from models.attention import attention_shapes, choose, install, prefer, report
from models.compile import channels_last, compile_blocks, set_tf32
from models.conditioning import Conditioning
from models.denoise import predict
from models.ema import Ema
from models.lora import attach, check_targets
from models.pipeline import empty_network, weights_hash
from models.sampler import ImageNoise, Sampler
from trainer.checkpoint.reshard_state import reslice
from trainer.config.deepspeed import deepspeed_config, micro_batch
from trainer.config.schema import OptimizerSettings, TrainSettings
from trainer.distributed.logs import log
from trainer.distributed.world import from_main, gather_rows, mean_over_ranks, sum_over_ranks
from trainer.engine.role import Role, skipped_updates
from trainer.engine.save_weights import save_adapter, save_folder
from trainer.engine.weights import start_from
from trainer.errors import UserError
from trainer.training.inputs import choose_inputs, rest, text_conditioning
from trainer.training.metrics import Meters
from trainer.training.run import Run

PREVIEW = 32


class TrainStage:
    """The base of pretraining, recording and backtracking; see trainer.training.loop.Stage for the contract. A stage has its
    sampler before its first role."""

    flops = 0.0
    sampler: Sampler
    needs: Sequence[str] = ()
    read_every = 1  # see data.loader.Batches

    def __init__(
        self,
        name: str,
        run: Run,
        settings: TrainSettings,
        images: bool,
        pipeline: Path | None,
        where: str | None = None,
    ):
        """images: whether the stage trains on images. pipeline: the folder whose parts may have encoded the shards; None
        for a stage that reads plain ones only. where: the stage's section of the settings, if that is not its name."""
        self.name, self.run, self.world, self.settings = name, run, run.world, settings
        self.steps, self.batch = settings.steps, settings.batch
        self.micro = micro_batch(settings.batch, settings.accumulation, run.world.size, where or name)
        self.inputs = choose_inputs(run, images, pipeline)
        self.dataset = run.dataset("train", self.inputs)
        if self.dataset.rejected:
            log.warning(f"{name}: left out of the shards: {dict(self.dataset.rejected)}")
        self.split = Split(run.world.size, self.micro, settings.accumulation)
        self.noise = run.noise(name)
        self.skipped = Counter()
        self.roles: dict[str, Role] = {}
        self.bases: dict[str, str] = {}  # of roles that are adapters: the sha256 of the network below
        self._hashes: dict[Path, str] = {}
        self.attention = ""  # the kernel that was chosen, by the first role
        self.chosen = ExitStack()  # what holds for the whole process while the stage lives
        set_tf32(run.settings.network.tf32)
        # What may differ between a run and its resumption: how long it trains, what it shows, and how it is spread over
        # processes and over network calls.
        spread = {"loop", "steps", "accumulation", "generator_split", "guidance_batch"}
        private = settings.model_dump(mode="json", exclude=spread)
        self.identity = {f"{name}.{k}": v for k, v in private.items() if not k.endswith("ds_config")}
        self.identity |= {"timestep_shift": run.settings.timestep_shift}
        self.identity |= {"seed": run.settings.seed, "precision": run.settings.precision, "samples": len(self.dataset)}
        if cached := [what for what in self.inputs if what in ("latents", "text")]:
            log.info(f"{name}: {' and '.join(cached)} come encoded from the shards")
            self.identity["data.cached"] = [*cached, self.dataset.made_by]

    def role(
        self,
        name: str,
        folder: Path,
        ds_config: str,
        optimizer: OptimizerSettings | None = None,
        split: int = 1,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        adapter: Path | Literal["new"] | None = None,
    ) -> Role:
        """The network of a weights folder as a role under DeepSpeed: trained with an optimizer's settings, frozen
        without.

        split: pieces that a micro-batch is cut into for this role's training. wrap: what is made of the loaded network,
        such as a Discriminator. adapter: a LoRA folder to go on from, or "new", makes the role a LoRA adapter on that
        network.
        """
        settings, clip = self.settings, self.settings.clip if optimizer else 0.0
        micro, accumulation = self.micro // split, settings.accumulation * split
        config = deepspeed_config(ds_config, micro, accumulation, clip, self.run.settings.precision, self.world.size)
        wanted, stage = self.run.settings.network, config["zero_optimization"]["stage"]
        if wanted.compile and stage == 3:
            raise UserError(
                f"network.compile=true does not go with ZeRO-3 ({name}: {ds_config}), which gathers weights inside "
                "the compiled blocks: use zero0, zero1 or zero2, or network.compile=false"
            )
        network = empty_network(folder)
        if wanted.checkpointing and optimizer:
            network.enable_gradient_checkpointing()
        self._choose_kernels(network)
        if wanted.compile:
            log.info(f"{name}: {compile_blocks(network)} blocks compile at their first call")
        variant = self.run.settings.variant
        if adapter:
            self._adapt(network, name, folder, adapter)
        self.roles[name] = role = Role(name, network, config, self.world, optimizer, folder, wrap, variant)
        if wanted.channels_last:
            if stage == 0 and not optimizer:
                channels_last(role.module)
            else:
                log.warning(f"{name}: network.channels_last is left out: DeepSpeed keeps these weights flat")
        return role

    def _adapt(self, network: nn.Module, name: str, folder: Path, adapter: Path | Literal["new"]) -> None:
        """Puts an adapter on a role's network, which will be filled from `folder`."""
        settings = self.run.settings
        attach(network, settings.lora, f"{settings.seed}/{self.name}/{name}", self.world.device, self.run.dtype)
        if adapter != "new":
            start_from(network, adapter, self.world)
        self.bases[name] = self.hash(folder)
        self.identity |= {"lora": settings.lora.identity(), f"{name}.base": self.bases[name]}

    def check_lora(self, *folders: Path) -> None:
        """Raises ModelError if adapters are wanted and a network has not the layers for them, before anything is loaded."""
        settings = self.run.settings
        for folder in set(folders) if settings.lora.rank else ():
            check_targets(folder, settings.lora, settings.variant)

    def hash(self, folder: Path) -> str:
        """The sha256 of a weights folder, read once and by rank 0 alone. Every rank must call it."""
        if folder not in self._hashes:
            mine = weights_hash(folder, self.run.settings.variant) if self.world.main else None
            self._hashes[folder] = from_main(mine, self.world)
        return self._hashes[folder]

    def saver(self, role: Role) -> Callable[..., None]:
        """What writes a role's state dict: as a denoiser's folder, or as a LoRA folder if it is an adapter; a function of
        (state, folder=, dtype=, about=) for rank 0, see `save_folder`."""
        if role.adapter:
            return partial(save_adapter, net=role.module, base=self.bases[role.name])
        return partial(save_folder, config=role.config)

    def _choose_kernels(self, network: nn.Module) -> None:
        """Chooses the attention kernel at the first network, by trying, and gives it to the network. Raises
        ModelError."""
        device, dtype = self.world.device, self.run.dtype
        if not self.attention:
            cond = self.sampler.text.encode([""], self.sampler.resolution).map(lambda v: v.to("meta"))
            x = torch.empty(1, *self.sampler.latent_shape, device="meta")
            t = torch.zeros(1, dtype=torch.long, device="meta")
            shapes = attention_shapes(network, lambda twin: predict(twin, x, t, cond))
            self.attention, others = choose(self.run.settings.network.attention, tuple(shapes), dtype, device)
            self.chosen.enter_context(prefer(self.attention, device))
            for line in report(self.attention, others, shapes, dtype):
                log.info(line)
        if not install(network, self.attention):
            log.info(
                f"attention: {type(network).__name__} keeps the processors of diffusers, which call the same kernel"
            )

    def begin(self, step: int) -> None:
        """Opens the data at a step."""
        world, workers = self.world, self.run.settings.data.workers
        split = self.micro, self.settings.accumulation
        self.batches = Batches(self.dataset, world.rank, world.size, *split, step, workers, self.read_every)

    def micro_batches(self, meters: Meters) -> Iterator[Batch]:
        """The micro-batches of one step; the time spent waiting for them is metered."""
        for _ in range(self.settings.accumulation):
            began = time.monotonic()
            batch = next(self.batches)
            meters.add("data_seconds", time.monotonic() - began)
            self.skipped.update(batch.skipped)
            yield batch

    def open_sampler(self, pipeline: Path) -> Sampler:
        """Text encoders, autoencoder and schedule of a pipeline; what only previews use waits on the host."""
        sampler = self.run.sampler(pipeline)
        rest(sampler, self.inputs)
        return sampler

    def encode(
        self, captions: list[str], cached: dict[str, Tensor], time_ids: Tensor | int | None = None
    ) -> Conditioning:
        """Conditioning of captions or of their cached text; time_ids: None for uncropped square images."""
        time_ids = self.sampler.resolution if time_ids is None else time_ids
        return text_conditioning(captions, cached, self.sampler, self.run.dtype, time_ids)

    def preview_captions(self, index: list[int]) -> list[str]:
        """Captions of a sample grid's images, by number: the configured prompts, else the first ones of the shards."""
        prompts = self.run.settings.sample.prompts
        if prompts:
            return [prompts[i % len(prompts)] for i in index]
        return [self.dataset[i % len(self.dataset)]["caption"] for i in index]

    def preview_grid(self, make: Callable[[list[str], ImageNoise], Tensor]) -> Tensor:
        """The grid of PREVIEW images, each rank making its share a micro-batch at a time: at once they would not fit beside
        the roles. make: uint8 images [B, 3, H, W] of B captions. Every rank calls it, and calls `make` as often."""
        share, made = -(-PREVIEW // self.world.size), []
        mine = [(self.world.rank * share + i) % PREVIEW for i in range(share)]
        for first in range(0, share, self.micro):
            index = mine[first : first + self.micro]
            noise = ImageNoise(self.run.settings.seed, index, self.sampler.latent_shape, self.world.device)
            made.append(make(self.preview_captions(index), noise))
        return self.grid(gather_rows(torch.cat(made), self.world)[:PREVIEW])

    def grid(self, images: Tensor) -> Tensor:
        """uint8 images [N, 3, H, W] to one grid [3, H', W'] in host memory, small images enlarged without smoothing."""
        images = images.cpu()
        return make_grid(enlarge(images, self.run.settings.sample.enlarge), nrow=8, padding=2, pad_value=128)

    def metrics(self) -> dict:
        """Skipped samples and updates so far over all ranks, and how far the weights moved since the last line. Every
        rank calls it."""
        count = torch.tensor([float(sum(self.skipped.values()))], device=self.world.device)
        values = {"skipped_samples": int(sum_over_ranks(count, self.world))}
        trained = {name: role for name, role in self.roles.items() if role.trained}
        values["skipped_updates"] = skipped_updates(self.roles)
        ratios = torch.stack([role.update_ratio() for role in trained.values()])
        ratios = [None if math.isnan(r) else r for r in mean_over_ranks(ratios, self.world).tolist()]
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

    def regroup(self, states: list[dict], saved: Split) -> dict:
        """See trainer.training.loop.Stage. What is counted on every rank is added up on rank 0: the metrics sum over ranks."""
        skipped = Counter()
        for state in states if self.world.main else ():
            skipped.update(state["skipped"])
        # The weights that an update ratio compares with may be another rank's now: the next line has none.
        watched = {name: watch | {"probe": None} for name, watch in states[0]["watched"].items()}
        return states[0] | {"skipped": dict(skipped), "watched": watched}

    def average_state(self, ema: Ema, role: Role) -> dict:
        """The average of a role's weights, and which elements of each weight this rank has."""
        return ema.state_dict() | {"ranges": role.ranges()}

    def regroup_average(self, states: list[dict], ema: Ema, role: Role) -> dict:
        """This rank's average, from the `average_state`s of all ranks of a run that was cut otherwise."""
        ranges = role.ranges()
        flat = reslice([s["shadow"] for s in states], [s["ranges"] for s in states], ranges)
        shadow = [v.view(mine.shape) for v, mine in zip(flat, ema.shadow, strict=True)]
        return states[0] | {"shadow": shadow, "ranges": ranges}

    def saved(self, needed: set[str]) -> None:
        pass

    def close(self) -> None:
        if hasattr(self, "batches"):
            self.batches.close()
        self.dataset.close()
        self.chosen.close()


def enlarge(images: Tensor, factor: int) -> Tensor:
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3) if factor > 1 else images
