"""Roles as DeepSpeed engines: teacher (and target), generator, fake score. Engines only run networks."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn

from models.ema import Ema
from models.lora import adapter_parameters
from trainer.config.deepspeed import WITHIN_NODE
from trainer.config.schema import OptimizerSettings
from trainer.distributed.logs import log
from trainer.distributed.world import World, node_group
from trainer.engine.optimizer import GuardedAdamW
from trainer.engine.weights import Weights, load_folder
from trainer.errors import UserError

PROBE = 1 << 16  # weights a role that `update_ratio` looks at


class Role:
    """One network under DeepSpeed, trained (with an optimizer) or frozen (without).

    network: with its weights, or on the meta device (`models.pipeline.empty_network`) and filled from `folder` here, every
    rank reading its own rows only. wrap: what is made of the filled network, such as a Discriminator. variant: of the
    weight files, here and in folders that are read later.

    Of a network with a LoRA adapter (models.lora.attach) only the adapter, and what was wrapped around the network, is
    trained, sliced, averaged, switched and saved: its base stays as it was loaded, in the engine's precision, and has no
    optimizer state. Call the role for a forward pass. `module` is the bare network,
    for terms that need autograd to an input only. `config` is the network's own configuration, as its folder has it.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        config: dict,
        world: World,
        optimizer: OptimizerSettings | None = None,
        folder: Path | None = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        variant: str = "",
    ):
        self.name, self.world, self.config = name, world, dict(getattr(network, "config", {}))
        self.trained = optimizer is not None
        self.stage = config["zero_optimization"]["stage"]
        if not self.trained and self.stage not in (0, 3):
            raise UserError(f"{name}: a frozen role runs at ZeRO stage 0 or 3, not {self.stage}: use zero0 or teacher")
        config = dict(config)
        within_node = config.pop(WITHIN_NODE, False)
        if within_node and (self.trained or self.stage != 3):
            raise UserError(f"{name}: `{WITHIN_NODE}` is for a frozen role at ZeRO stage 3, such as teacher_node")
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        began, tensors = time.monotonic(), 0
        if folder is not None:
            group = node_group(world) if within_node else None
            tensors = load_folder(network, folder, world, dtype, config, group, variant)
        loaded = network
        if wrap is not None:
            network = wrap(loaded)
            for child in network.children() if network is not loaded else ():
                if child is not loaded:
                    child.to(world.device, dtype)
        self.adapter = bool(adapter_parameters(loaded))
        network.requires_grad_(False).train(self.trained)
        own = self._own(network, loaded)
        for parameter in own.values():
            parameter.requires_grad_(self.trained)
        adam = None
        if optimizer is not None:
            adam = GuardedAdamW(list(own.values()), optimizer, world)
        self.adam = adam
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=network, optimizer=adam, config=config)
        if self.stage == 0 and world.size == 1 and dtype == torch.float32:
            # Alone, DeepSpeed would still copy every gradient into a buffer and back: a quarter of a step at 35 M weights.
            self.engine.enable_backward_allreduce = False
        whole = self.engine.module
        self.weights = Weights(self._own(whole, loaded) if self.adapter else whole, world, variant)
        self._probe: Tensor | None = self._some_weights()
        masters = 0
        if folder is not None and self.trained and not self.adapter and dtype != torch.float32:
            masters = Weights(loaded, world, variant).load_masters(folder, self.optimizer)
        if folder is not None:
            note = f", {masters} of them in full precision for the optimizer" if masters else ""
            log.info(f"{name}: {tensors} tensors from {folder} in {time.monotonic() - began:.1f} s{note}")

    def _own(self, network: nn.Module, loaded: nn.Module) -> dict[str, nn.Parameter]:
        """The role's own parameters by their names in files: all, or an adapter's and those around the loaded network."""
        if not self.adapter:
            return dict(network.named_parameters())
        inside = {id(p) for p in loaded.parameters()}
        around = {name: p for name, p in network.named_parameters() if id(p) not in inside}
        return adapter_parameters(loaded) | around

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.engine(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def ranges(self) -> list[tuple[int, int]]:
        """The flat elements [start, end) of each weight that this rank's slice has; see `local`."""
        return [(s.start, s.end) for s in self.weights.slices]

    def step(self, loss: Tensor, rate: float, want_norm: bool = False) -> float | None:
        """One micro-step: backward, and at the end of an accumulation the optimizer with learning rate `rate`.

        Returns the gradient norm before clipping if asked for and known (this waits for the device).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.backward(loss)
        plain = not hasattr(self.optimizer, "_global_grad_norm")
        norm = None
        if want_norm and plain and self.engine.is_gradient_accumulation_boundary():
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.engine.step()
        if want_norm and not plain:
            norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def skipped_updates(self) -> int:
        """Updates left out because of a gradient that was not finite, by us or by DeepSpeed. Waits for the device."""
        return int(self.adam.skipped) + self.engine.skipped_steps

    def _some_weights(self) -> Tensor:
        """A copy of the first weights of this rank's largest slice, float32."""
        largest = max(self.local(), key=lambda t: t.numel())
        return largest.reshape(-1)[:PROBE].float().clone()

    def update_ratio(self) -> Tensor:
        """|change| / |weights| of some of this rank's weights since the last call: a scalar on the device. NaN at the first
        call of a run that was cut anew, which has none to compare with."""
        now = self._some_weights()
        if self._probe is None:
            ratio = torch.tensor(torch.nan, device=now.device)
        else:
            ratio = (now - self._probe).norm() / now.norm().clamp_min(1e-12)
        self._probe = now
        return ratio

    def watch_state(self) -> dict:
        """What `skipped_updates` and `update_ratio` remember, for the run state."""
        return {"skipped": self.adam.skipped, "probe": self._probe}

    def load_watch_state(self, state: dict) -> None:
        self.adam.skipped.copy_(state["skipped"])
        self._probe = None if state["probe"] is None else self._probe.copy_(state["probe"])

    def local(self) -> list[Tensor]:
        """The weights that this rank owns, 1/N of every parameter, flat; see trainer.engine.weights.Slice."""
        return self.weights.local()

    @contextmanager
    def averaged(self, ema: Ema):
        """The network with the averaged weights, for the time of the block; training weights come back to the bit. Every
        rank must enter it."""
        kept = [t.clone() for t in self.local()]
        self.weights.write(ema.shadow)
        try:
            yield self
        finally:
            self.weights.write(kept)

    def state_dict(self, ema: Ema | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor] | None:
        """A copy of the whole network's (or the adapter's) weights, or of their average, on rank 0 (host memory), None on
        the others. Every rank must call it. dtype: default: the live one."""
        dtype = dtype or self.weights.slices[0].parameter.dtype
        return self.weights.copy(dtype) if ema is None else self.weights.gather(ema.shadow, dtype)

    def save_engine(self, folder: Path) -> None:
        """Writes weights and optimizer into folder/NAME, in DeepSpeed's form. Every rank must call it.

        Frozen weights stay out: ZeRO-3 would save them in pieces that it loses on resume (DeepSpeed#3090, #5439), and
        the pipeline folder has them, known by their hash.
        """
        self.engine.save_checkpoint(
            str(folder), tag=self.name, save_latest=False, exclude_frozen_parameters=self.adapter
        )

    def load_engine(self, folder: Path) -> bool:
        """Reads what `save_engine` wrote; False if there is nothing. Raises whatever DeepSpeed raises for a damaged
        file, and RuntimeError for one of other parameters."""
        strictly = load_trained if self.adapter else None
        loaded, _ = self.engine.load_checkpoint(str(folder), tag=self.name, custom_load_fn=strictly)
        return loaded is not None


def skipped_updates(roles: dict[str, Role]) -> int:
    """Updates that were left out so far, by all roles. Reads the device."""
    return sum(role.skipped_updates() for role in roles.values() if role.trained)


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Loads a state dict of exactly the trained parameters into a network; the frozen ones stay. Raises RuntimeError."""
    frozen = {name for name, p in dst.named_parameters() if not p.requires_grad}
    wrong = dst.load_state_dict(src, strict=False)
    if wrong.unexpected_keys or set(wrong.missing_keys) != frozen:
        missing = sorted(set(wrong.missing_keys) - frozen)
        raise RuntimeError(f"missing {missing[:3]}, unexpected {wrong.unexpected_keys[:3]}")
