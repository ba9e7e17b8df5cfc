"""Builds the roles of a stage: weights folder -> network with its kernels and adapter -> DeepSpeed engine."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from models.attention import attention_shapes, choose_kernel, install_processors, kernel_report, prefer_kernel
from models.compile import channels_last, checkpoint_blocks, compile_blocks
from models.denoise import predict
from models.lora import add_adapter
from models.pipeline import empty_network
from models.sampler import Sampler
from trainer.config.deepspeed import check_role, deepspeed_config
from trainer.config.schema import OptimizerSettings, TrainSettings
from trainer.distributed.logs import log
from trainer.engine.role import Role
from trainer.engine.weight_slices import load_adapter
from trainer.training.run import Run


class RoleBuilder:
    """Builds the roles of a stage. micro: the samples of one rank's micro-batch. sampler: tells the shapes that the
    attention kernels are tried with."""

    def __init__(self, stage: str, run: Run, settings: TrainSettings, micro: int, sampler: Sampler):
        self.stage, self.run, self.settings, self.micro, self.sampler = stage, run, settings, micro, sampler
        self.world = run.world
        self.shapes = len(run.settings.data.shapes)
        self.attention = ""  # the kernel, chosen with the first network
        self.process_wide = ExitStack()  # the attention preference, which holds while the stage lives

    def build(
        self,
        name: str,
        folder: Path,
        ds_config: str,
        optimizer: OptimizerSettings | None = None,
        split: int = 1,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        adapter: Path | Literal["new"] | None = None,
    ) -> Role:
        """The network of a weights folder under DeepSpeed: trained with an optimizer's settings, frozen without.

        split: pieces that a micro-batch is cut into for this role's training. wrap: makes a module around the loaded
        network, such as a Discriminator. adapter: "new", or a LoRA folder to start from, makes the role a LoRA adapter on
        that network. Raises UserError for settings that contradict each other, ModelError for weights that do not fit.
        """
        clip = self.settings.clip if optimizer else 0.0
        micro, accumulation = self.micro // split, self.settings.accumulation * split
        wanted, precision = self.run.settings.network, self.run.settings.precision
        fp32 = wanted.grad_accum_dtype == "fp32" and optimizer is not None
        config = deepspeed_config(ds_config, micro, accumulation, clip, precision, self.world.size, fp32)
        zero = config["zero_optimization"]["stage"]
        check_role(name, config, optimizer is not None, ds_config if wanted.compile else "")
        network = empty_network(folder)
        self._choose_attention(network)
        if wanted.compile:
            log.info(f"{name}: {compile_blocks(network, self.shapes)} blocks compile at their first call")
        base = ""
        if adapter:
            base = self.run.weights_hash(folder)
            seed = f"{self.run.settings.seed}/{self.stage}/{name}"
            add_adapter(network, self.run.settings.lora, seed, self.world.device, self.run.dtype)
            if adapter != "new":
                load_adapter(network, adapter, self.world)
        if wanted.checkpointing and optimizer:
            checkpoint_blocks(network)
        variant = self.run.settings.variant
        role = Role(name, network, config, self.world, optimizer, folder, wrap=wrap, variant=variant, base=base)
        if wanted.channels_last:
            if zero == 0 and not optimizer:
                channels_last(role.module)
            else:
                log.warning(f"{name}: ignores network.channels_last: DeepSpeed keeps these weights flat")
        return role

    def _choose_attention(self, network: nn.Module) -> None:
        """Tries the attention kernels with the first network's shapes, and installs the chosen one. Raises ModelError."""
        device, dtype = self.world.device, self.run.dtype
        if not self.attention:
            cond = self.sampler.text.encode(["", ""], self.sampler.size).map(lambda v: v.to("meta"))
            x = torch.empty(2, *self.sampler.latent_shape, device="meta")
            t = torch.zeros(2, dtype=torch.long, device="meta")
            shapes = attention_shapes(network, lambda twin: predict(twin, x, t, cond))
            self.attention, others = choose_kernel(self.run.settings.network.attention, tuple(shapes), dtype, device)
            self.process_wide.enter_context(prefer_kernel(self.attention, device))
            for line in kernel_report(self.attention, others, shapes, dtype):
                log.info(line)
        if not install_processors(network, self.attention):
            log.info(f"attention: {type(network).__name__} keeps diffusers' processors, which call the same kernel")

    def close(self) -> None:
        self.process_wide.close()
