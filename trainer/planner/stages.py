"""Memory, work and traffic of recording and backtracking on given machines, moment by moment. Pure arithmetic over what
models.profile has measured."""

import math
from dataclasses import dataclass, replace

import torch

from models.architecture import Architecture
from models.errors import ModelError
from models.gan import no_features
from models.profile import Cost, cost
from trainer.config.deepspeed import deepspeed_config, micro_batch
from trainer.config.schema import RunSettings
from trainer.distributed.world import World
from trainer.planner.memory import RoleBytes, Zero, checkpoint_bytes, forward_traffic, role_bytes, update_traffic

# CUDA context, cuBLAS and cuDNN workspaces, NCCL channels: ours, a round figure for one process on one GPU.
RUNTIME = 2e9


@dataclass(frozen=True)
class StagePlan:
    """One stage on one GPU. moments: bytes by moment. flops: of a step. traffic: bytes sent a step. host: bytes a rank."""

    stage: str
    micro: int
    roles: dict[str, RoleBytes]
    zero: dict[str, int]
    activations: dict[str, float]
    fixed: dict[str, float]
    moments: dict[str, float]
    flops: float
    traffic: float
    checkpoint: float
    steps: int

    @property
    def peak(self) -> tuple[str, float]:
        return max(self.moments.items(), key=lambda item: item[1])

    @property
    def host(self) -> float:
        return sum(role.host for role in self.roles.values())


def network_cost(settings: RunSettings, architecture: Architecture, trained: bool) -> Cost:
    """The measured cost of a role's network; a frozen teacher has no LoRA matrices."""
    rank = settings.lora.rank if trained else 0
    return cost(
        architecture.denoiser,
        architecture.latent_shape(settings.data.resolution),
        architecture.tokens,
        torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        settings.network.checkpointing,
        rank,
        tuple(settings.lora.targets) if rank else (),
        settings.network.attention != "math",
    )


def with_head(net: Cost, architecture: Architecture, resolution: int) -> Cost:
    """The fake score with DMD2's GAN head on the middle block's features: convolutions 4 x 4 that halve the side down to
    4, and one to a single logit. Its activations and FLOP are below a hundredth of the network's and left out. Raises
    ModelError for a network without middle block."""
    blocks = architecture.denoiser.get("block_out_channels")
    if blocks is None:
        raise ModelError(no_features(architecture.denoiser["_class_name"]))
    channels, side = blocks[-1], architecture.latent_shape(resolution)[1] // 2 ** (len(blocks) - 1)
    halvings = max(int(math.log2(max(side, 4))) - 2, 0)
    head = (16 * channels * channels,) * halvings + (16 * channels,)
    return replace(net, trainable=net.trainable + head)


def _zero(name: str, settings: RunSettings, micro: int, accumulation: int, world: World) -> Zero:
    return Zero.of(deepspeed_config(name, micro, accumulation, 0.0, settings.precision, world.size))


def _fixed(settings: RunSettings, architecture: Architecture) -> dict[str, float]:
    width = 2 if settings.precision == "bf16" else 4
    return {
        "text encoders": width * architecture.text_parameters,
        "VAE (float32)": 4 * architecture.vae_parameters,
        "CUDA, NCCL (assumed)": RUNTIME,
    }


def plan_record(settings: RunSettings, architecture: Architecture, ranks: int) -> StagePlan:
    """Stage 1: a frozen generator's samples, and denoising steps on them. Raises UserError."""
    s, world = settings.record, World(0, ranks, 0, torch.device("cpu"))
    micro = micro_batch(s.batch, s.accumulation, world.size, "record")
    width = 2 if settings.precision == "bf16" else 4
    frozen, net = (network_cost(settings, architecture, trained) for trained in (False, True))
    zeros = {
        "generator": _zero(s.teacher_ds_config, settings, micro, s.accumulation, world),
        "fake_score": _zero(s.ds_config, settings, micro, s.accumulation, world),
    }
    generator = role_bytes(frozen, zeros["generator"], ranks, width, trained=False)
    fake = role_bytes(net, zeros["fake_score"], ranks, width, trained=True)
    fixed = _fixed(settings, architecture)
    held = sum(fixed.values())
    acts = {"sampling, no gradient": micro * frozen.forward_peak, "fake-score turn": micro * net.peak}
    moments = {
        "sampling": held + generator.busy + fake.idle + acts["sampling, no gradient"],
        "fake-score turn": held + generator.idle + fake.busy + acts["fake-score turn"],
        "fake-score update": held + generator.idle + fake.idle + _updating(fake),
    }
    passes = 3 if settings.network.checkpointing else 2
    flops = micro * s.accumulation * (frozen.forward_flops + net.train_flops)
    traffic = update_traffic(net, zeros["fake_score"], ranks, width, passes, s.accumulation)
    traffic += s.accumulation * forward_traffic(frozen, zeros["generator"], ranks, width)
    saved = checkpoint_bytes(net, zeros["fake_score"], width, ema=False)
    roles = {"generator": generator, "fake_score": fake}
    stages = {name: zero.stage for name, zero in zeros.items()}
    return StagePlan("record", micro, roles, stages, acts, fixed, moments, flops, traffic, saved, s.steps)


def plan_backtrack(settings: RunSettings, architecture: Architecture, ranks: int) -> StagePlan:
    """Stage 2: generator turns (with target and fake score on the sample) and fake-score updates. Raises UserError."""
    s, gan, world = settings.backtrack, settings.gan, World(0, ranks, 0, torch.device("cpu"))
    micro = micro_batch(s.batch, s.accumulation, world.size, "backtrack")
    piece = -(-micro // s.generator_split)
    width = 2 if settings.precision == "bf16" else 4
    frozen, net = (network_cost(settings, architecture, trained) for trained in (False, True))
    judge = with_head(net, architecture, settings.data.resolution) if gan.enabled else net
    names = {"teacher": s.teacher_ds_config, "generator": s.generator_ds_config, "fake_score": s.fake_score_ds_config}
    zeros = {role: _zero(name, settings, micro, s.accumulation, world) for role, name in names.items()}
    teacher = role_bytes(frozen, zeros["teacher"], ranks, width, trained=False)
    generator = role_bytes(net, zeros["generator"], ranks, width, trained=True, ema=True)
    fake = role_bytes(judge, zeros["fake_score"], ranks, width, trained=True)
    fixed = _fixed(settings, architecture)
    held = sum(fixed.values())
    guided = 1 if s.guidance_scale == 1 else 2
    head = piece * net.encoder_saved if gan.enabled else 0
    acts = {
        "generator turn, kept": piece * net.saved,
        "generator turn, backward": piece * net.peak,
        "teacher's guided pass": (guided if s.guidance_batch else 1) * piece * frozen.forward_peak,
        "fake-score turn": micro * (net.peak + (net.encoder_saved if gan.enabled else 0)),
    }
    scores = max(teacher.gathered + acts["teacher's guided pass"], fake.gathered + piece * net.forward_peak + head)
    # With accumulation a generator's gradient waits through the fake score's micro-steps, and the other way round.
    waiting = s.accumulation > 1
    wait_g = generator.gradients if waiting and not generator.gradients_stay else 0
    wait_f = fake.gradients if waiting and not fake.gradients_stay else 0
    g_turn = held + teacher.idle + fake.idle + wait_f + generator.busy
    moments = {
        "generator turn: scores": g_turn + acts["generator turn, kept"] + scores,
        "generator turn: backward": g_turn + acts["generator turn, backward"],
        "generator update": held + teacher.idle + fake.idle + wait_f + generator.idle + _updating(generator),
        "fake-score turn": held + teacher.idle + generator.idle + wait_g + fake.busy + acts["fake-score turn"],
        "fake-score update": held + teacher.idle + generator.idle + wait_g + fake.idle + _updating(fake),
        # The averaged weights take the place of the training weights, which are kept beside them.
        "EMA for samples and checkpoints": held + teacher.idle + fake.idle + generator.idle + generator.parameters,
    }
    # A generator of n steps makes a sample at a random one of them: (n - 1) / 2 passes without gradient before it.
    before = (len(s.student_timesteps) - 1) / 2 if s.student_timesteps else 0
    fresh = 0 if s.reuse_x0 else s.fake_updates - 1
    forward, share = frozen.forward_flops, 1 / s.fake_updates
    turn = net.train_flops + guided * forward + net.forward_flops * (1 + before)
    step = share * (turn + fresh * net.forward_flops * (1 + before)) + net.train_flops
    if gan.enabled:
        encoder = net.encoder_flops
        full = 3 * encoder + (encoder if settings.network.checkpointing else 0)
        step += full * (1 if gan.shared_pass else 2)  # real latents; without sharing the fake ones once more
        step += share * encoder * (1 if gan.shared_pass else 2)  # to the sample: a backward, and its own forward
    passes, acc = 3 if settings.network.checkpointing else 2, s.accumulation
    sends = update_traffic(judge, zeros["fake_score"], ranks, width, passes, acc)
    sends += share * update_traffic(net, zeros["generator"], ranks, width, passes, acc * s.generator_split)
    calls = 1 if s.guidance_batch else guided
    sends += share * acc * s.generator_split * calls * forward_traffic(frozen, zeros["teacher"], ranks, width)
    sends += share * acc * s.generator_split * forward_traffic(judge, zeros["fake_score"], ranks, width)
    sends += share * acc * fresh * forward_traffic(net, zeros["generator"], ranks, width)
    saved = checkpoint_bytes(net, zeros["generator"], width, ema=True)
    saved += checkpoint_bytes(judge, zeros["fake_score"], width, ema=False) + width * net.parameters
    roles = {"teacher": teacher, "generator": generator, "fake_score": fake}
    stages = {name: zero.stage for name, zero in zeros.items()}
    flops = micro * acc * step
    return StagePlan("backtrack", micro, roles, stages, acts, fixed, moments, flops, sends, saved, s.steps)


def _updating(role: RoleBytes) -> float:
    return role.update + (0 if role.gradients_stay else role.gradients)


PLANS = {"record": plan_record, "backtrack": plan_backtrack}
