"""Memory, traffic and FLOP of recording and backtracking on given GPUs."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch

from models.architecture import Architecture
from models.profile import NetworkMemory, PassFlops, encoder_parameters, head_parameters, network_memory, pass_flops
from models.settings import LoraSettings
from trainer.config.deepspeed import check_role, check_split, deepspeed_config, micro_batch
from trainer.config.schema import RunSettings
from trainer.planner.flops import backtrack_flops, record_flops, sampling_passes, training_passes
from trainer.planner.images import encodes_images, encoding_cost, images_per_call, largest_size
from trainer.planner.memory import PlannedRole, Zero

# CUDA context, cuBLAS and cuDNN workspaces, NCCL channels: our round figure for one process on one GPU.
RUNTIME = 2e9
# Seconds of Python per parameter tensor that ZeRO-3 adds to a forward and backward pass, see docs/planning.md.
ZERO3_HOOKS = 0.26e-3


def role_network(settings: RunSettings, architecture: Architecture, trained: bool) -> NetworkMemory:
    """The measured network of a trained role, or of a frozen one, which has no LoRA matrices."""
    return network_memory(
        architecture.denoiser,
        architecture.latent_shape(largest_size(settings.data)),
        architecture.tokens,
        torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        settings.network.checkpointing,
        settings.lora if trained else LoraSettings(),
        fused=settings.network.attention != "math",
    )


def network_flops(settings: RunSettings, architecture: Architecture) -> PassFlops:
    """The counted passes of the run's networks."""
    shape = architecture.latent_shape(largest_size(settings.data))
    return pass_flops(architecture.denoiser, shape, architecture.tokens, settings.gan.enabled, settings.lora)


class StagePlan:
    """One stage on one of `ranks` GPUs; sizes in bytes. Raises UserError for a batch that does not divide and for a DeepSpeed
    configuration with which the stage would not start, ModelError for a network that the GAN head cannot read."""

    name: str
    roles: dict[str, PlannedRole]
    activations: dict[str, float]  # by the pass that needs them
    moments: dict[str, float]  # in use at each moment of a step that may be the peak
    traffic: float  # sent per average step
    checkpoint: float  # on disk
    sample_flops: Callable[[RunSettings, PassFlops, bool], float]  # per sample of an average step

    def __init__(self, settings: RunSettings, architecture: Architecture, ranks: int):
        self.settings, self.architecture, self.ranks = settings, architecture, ranks
        self.options = getattr(settings, self.name)
        self.micro = micro_batch(self.options.batch, self.options.accumulation, ranks, self.name)
        self.width = 2 if settings.precision == "bf16" else 4
        self.frozen, self.trained = (role_network(settings, architecture, trained) for trained in (False, True))
        # Backward passes gather weights under ZeRO-3 as forward passes do, and so does recomputation.
        self.gathers = 3 if settings.network.checkpointing else 2
        self.fixed = {
            "text encoders": self.width * architecture.text_parameters,
            "VAE (float32)": 4 * architecture.vae_parameters,
            "CUDA, NCCL (assumed)": RUNTIME,
        }

    @property
    def flops(self) -> float:
        """FLOP of the denoisers per average step, recomputation included."""
        cost, recompute = network_flops(self.settings, self.architecture), self.settings.network.checkpointing
        return self.micro * self.options.accumulation * self.sample_flops(self.settings, cost, recompute)

    @property
    def image_flops(self) -> float:
        """FLOP of the autoencoder per step, in float32."""
        return 0.0

    @property
    def uses_zero3(self) -> bool:
        """Whether a role is trained at ZeRO-3."""
        return any(role.trained and role.zero.stage == 3 for role in self.roles.values())

    def seconds(self, speed: float) -> float:
        """Of an average step at `speed` bf16 FLOP/s. TF32, in which a GPU computes float32, has half of bf16's peak."""
        return (self.flops + 2 * self.image_flops) / speed

    def zero3_seconds(self, speed: float, micro: int) -> tuple[float, float]:
        """What ZeRO-3's Python takes of a forward and backward pass, and the GPU's work in it at `speed` FLOP/s. The pass
        takes at least the longer of the two."""
        cost, recompute = network_flops(self.settings, self.architecture), self.settings.network.checkpointing
        tensors = len(self.trained.trainable) + len(self.trained.frozen)
        work = micro * training_passes(self.settings, cost, recompute) * cost.forward
        return ZERO3_HOOKS * tensors, work / speed

    @property
    def peak(self) -> tuple[str, float]:
        """The moment with the highest memory use, and its bytes."""
        return max(self.moments.items(), key=lambda item: item[1])

    @property
    def host(self) -> float:
        """Bytes of host memory per rank."""
        return sum(role.host for role in self.roles.values())

    @property
    def idle(self) -> float:
        """Bytes in use while no network computes."""
        return sum(self.fixed.values()) + sum(role.idle for role in self.roles.values())

    def _role(
        self, name: str, network: NetworkMemory, ds_config: str, trained: bool, averaged: bool = False
    ) -> PlannedRole:
        """Raises UserError for a DeepSpeed configuration with which the stage would not start."""
        wanted, precision, accumulation = self.settings.network, self.settings.precision, self.options.accumulation
        fp32 = trained and wanted.grad_accum_dtype == "fp32"
        config = deepspeed_config(ds_config, self.micro, accumulation, 0.0, precision, self.ranks, fp32)
        check_role(name, config, trained, ds_config if wanted.compile else "")
        zero = Zero(**config["zero_optimization"])
        return PlannedRole(network, zero, self.ranks, self.width, trained, averaged, fp32)


class RecordPlan(StagePlan):
    """Stage 1: samples of the frozen generator, and denoising steps of the fake score on them."""

    name = "record"
    sample_flops = staticmethod(record_flops)

    @cached_property
    def roles(self) -> dict[str, PlannedRole]:
        return {
            "generator": self._role("generator", self.frozen, self.options.teacher_ds_config, trained=False),
            "fake_score": self._role("fake_score", self.trained, self.options.ds_config, trained=True),
        }

    @property
    def activations(self) -> dict[str, float]:
        return {
            "sampling, no gradient": self.micro * self.frozen.forward_peak,
            "fake-score turn": self.micro * self.trained.peak,
        }

    @property
    def moments(self) -> dict[str, float]:
        generator, fake = self.roles["generator"], self.roles["fake_score"]
        activations = self.activations
        return {
            "sampling": self.idle + generator.computing + activations["sampling, no gradient"],
            "fake-score turn": self.idle + fake.computing + activations["fake-score turn"],
            "fake-score update": self.idle + fake.updating,
        }

    @property
    def traffic(self) -> float:
        accumulation = self.options.accumulation
        sampling = accumulation * sampling_passes(self.settings) * self.roles["generator"].forward_traffic
        return sampling + self.roles["fake_score"].update_traffic(self.gathers, accumulation)

    @property
    def checkpoint(self) -> float:
        return self.roles["fake_score"].checkpoint


class BacktrackPlan(StagePlan):
    """Stage 2: generator turns (with target and fake score on the sample) and fake-score updates."""

    name = "backtrack"
    sample_flops = staticmethod(backtrack_flops)

    def __init__(self, settings: RunSettings, architecture: Architecture, ranks: int):
        super().__init__(settings, architecture, ranks)
        check_split(self.options.generator_split, self.options.batch, self.options.accumulation, ranks)
        self.encodes = encodes_images(settings)

    @cached_property
    def roles(self) -> dict[str, PlannedRole]:
        s, fake = self.options, self.trained
        if self.settings.gan.enabled:
            sizes = self.settings.data.shapes
            shape = tuple(map(min, zip(*map(self.architecture.latent_shape, sizes), strict=True)))
            # The activations of the head are below a hundredth of the network's and left out.
            head = head_parameters(self.architecture.denoiser, shape)
            fake = replace(fake, trainable=fake.trainable + head)
        return {
            "teacher": self._role("teacher", self.frozen, s.teacher_ds_config, trained=False),
            "generator": self._role("generator", self.trained, s.generator_ds_config, trained=True, averaged=True),
            "fake_score": self._role("fake_score", fake, s.fake_score_ds_config, trained=True),
        }

    @property
    def piece(self) -> int:
        """Samples of a micro-batch that the generator is trained on at once."""
        return self.micro // self.options.generator_split

    @property
    def image_flops(self) -> float:
        """The GAN term's real images, unless the shards are encoded."""
        if not self.encodes:
            return 0.0
        images = self.micro * self.options.accumulation
        return images * encoding_cost(self.architecture, largest_size(self.settings.data)).flops

    @property
    def activations(self) -> dict[str, float]:
        s, net, piece = self.options, self.trained, self.piece
        doubled = s.guidance_batch and s.guidance_scale != 1
        images = {}
        if self.encodes:
            size = largest_size(self.settings.data)
            peak = encoding_cost(self.architecture, size).peak
            images = {"real images, encoded": images_per_call(size, self.micro) * peak}
        return images | {
            "generator turn, kept": piece * net.saved,
            "generator turn, backward": piece * net.peak,
            "teacher's guided pass": (2 if doubled else 1) * piece * self.frozen.forward_peak,
            "fake-score turn": self.micro * (net.peak + (net.encoder_saved if self.settings.gan.enabled else 0)),
        }

    @property
    def moments(self) -> dict[str, float]:
        teacher, generator, fake = self.roles.values()
        activations, idle, piece = self.activations, self.idle, self.piece
        head = piece * self.trained.encoder_saved if self.settings.gan.enabled else 0
        scores = max(
            teacher.gathered + activations["teacher's guided pass"],
            fake.gathered + piece * self.trained.forward_peak + head,
        )
        # With accumulation the gradients of one role wait while the other computes.
        waiting = self.options.accumulation > 1
        during_generator = idle + (fake.passing_gradients if waiting else 0)
        during_fake = idle + (generator.passing_gradients if waiting else 0)
        generator_turn = during_generator + generator.computing
        # Before there is a graph.
        encoding = idle + ((generator.passing_gradients + fake.passing_gradients) if waiting else 0)
        images = {}
        if self.encodes:
            images = {"fake-score turn: real images": encoding + activations["real images, encoded"]}
        return images | {
            "generator turn: scores": generator_turn + activations["generator turn, kept"] + scores,
            "generator turn: backward": generator_turn + activations["generator turn, backward"],
            "generator update": during_generator + generator.updating,
            "fake-score turn": during_fake + fake.computing + activations["fake-score turn"],
            "fake-score update": during_fake + fake.updating,
            # The averaged weights replace the training weights, of which a copy is kept.
            "EMA for samples and checkpoints": idle + generator.parameters,
        }

    @property
    def traffic(self) -> float:
        s, sampling = self.options, sampling_passes(self.settings)
        teacher, generator, fake = self.roles.values()
        pieces = s.accumulation * s.generator_split
        target_calls = 1 if s.guidance_batch or s.guidance_scale == 1 else 2
        # Passes of the GAN term through the part of the fake score that its head reads, as shares of a whole pass.
        shared, share = self.settings.gan.shared_pass, self._encoder_share
        head_passes = (self.gathers - 1 if shared else self.gathers) * share  # the generator's: back to the sample
        fake_gathers = self.gathers * (1 + (1 if shared else 2) * share)
        scores = target_calls * teacher.forward_traffic + (1 + head_passes) * fake.forward_traffic
        generator_update = generator.update_traffic(self.gathers, pieces)
        generator_update += pieces * ((sampling - 1) * generator.forward_traffic + scores)
        fresh_samples = 0 if s.reuse_x0 else (s.fake_updates - 1) * s.accumulation
        generator_update += fresh_samples * sampling * generator.forward_traffic
        return fake.update_traffic(fake_gathers, s.accumulation) + generator_update / s.fake_updates

    @property
    def _encoder_share(self) -> float:
        """Share of the fake score's weights that the GAN head's own passes need; 0 without the GAN term."""
        if not self.settings.gan.enabled:
            return 0.0
        return encoder_parameters(self.architecture.denoiser) / self.trained.parameters

    @property
    def checkpoint(self) -> float:
        """Also has the weights for evaluation in float32: the averaged ones and, with `save_raw`, those before averaging."""
        engines = self.roles["generator"].checkpoint + self.roles["fake_score"].checkpoint
        return engines + (2 if self.options.save_raw else 1) * 4 * sum(self.trained.trainable)


PLANS: dict[str, type[StagePlan]] = {"record": RecordPlan, "backtrack": BacktrackPlan}
