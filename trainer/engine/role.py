"""Roles (teacher and target, generator, fake score) as DeepSpeed engines: they run networks, and know no objective."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.lora import adapter_parameters
from trainer.config.deepspeed import WITHIN_NODE, check_role
from trainer.config.schema import OptimizerSettings
from trainer.distributed.logs import log
from trainer.distributed.world import World, node_group
from trainer.engine.deepspeed_internals import gradient_norm, measures_norm, swaps_to_nvme, write_files_with
from trainer.engine.initialize import initialize
from trainer.engine.masters import Masters
from trainer.engine.optimizer import GuardedAdamW
from trainer.engine.save_weights import Snapshot
from trainer.engine.weight_slices import Weights, load_folder

WATCHED = 1 << 16  # weights per role that `update_ratio` looks at


class Role:
    """A network under DeepSpeed: trained if it has an optimizer, else frozen. Call it for a forward pass.

    network: with its weights, or on the meta device (`models.pipeline.empty_network`) and filled from `folder` here, every
    rank reading its own part only. config: DeepSpeed's. wrap: makes a module around the filled network, such as a
    Discriminator. variant: of weight files, here and in folders that are read later. base: sha256 of the network below a
    LoRA adapter.

    If the network carries an adapter (models.lora), only the adapter and what is wrapped around the network are trained,
    sharded, averaged, switched and saved. The base stays as it was loaded, in the engine's precision, without optimizer state.

    settings: the optimizer's; None if frozen. module: the bare network, for terms that need gradients with respect to an
    input. config: the network's own configuration. keep_norm: set before an update whose gradient norm (before clipping) is
    wanted as `last_norm`: a tensor, so that the update does not wait for the device, or a float after a resume.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        config: dict,
        world: World,
        optimizer: OptimizerSettings | None = None,
        folder: Path | None = None,
        *,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        variant: str = "",
        base: str = "",
    ):
        self.name, self.world, self.base, self.config = name, world, base, dict(getattr(network, "config", {}))
        self.settings, self.trained = optimizer, optimizer is not None
        self.stage = config["zero_optimization"]["stage"]
        self.keep_norm = False
        self.last_norm: Tensor | float | None = None
        check_role(name, config, self.trained)
        within_node, config = config.get(WITHIN_NODE, False), {k: v for k, v in config.items() if k != WITHIN_NODE}
        dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
        began, tensors, masters = time.monotonic(), 0, 0
        if folder is not None:
            group = node_group(world) if within_node else None
            tensors = load_folder(network, folder, world, dtype, config, group, variant)
        self.adapter = bool(adapter_parameters(network))
        module = wrap(network) if wrap else network
        for child in module.children() if wrap else ():
            if child is not network:  # which is where it belongs already
                child.to(world.device, dtype)
        module.requires_grad_(False).train(self.trained)
        own = _own_parameters(module, network)
        for parameter in own.values():
            parameter.requires_grad_(self.trained)
        self.adam = GuardedAdamW(list(own.values()), optimizer, world) if optimizer else None
        self.engine = initialize(module, self.adam, config)
        self.weights = Weights(own if self.adapter else self.module, world, variant)
        if folder is not None and self.trained and not self.adapter and dtype != torch.float32:
            masters = Weights(network, world, variant).load_masters(folder, self.engine)
        self.masters = Masters(name, self.weights, self.engine) if self.trained else None
        self._weights_at_line = self._some_weights() if self.trained else None
        if folder is not None:
            note = f", {masters} of them in full precision for the optimizer" if masters else ""
            log.info(f"{name}: {tensors} tensors from {folder} in {time.monotonic() - began:.1f} s{note}")

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.engine(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def step(self, loss: Tensor, rate: float) -> None:
        """One micro-step: a backward pass and, at the end of an accumulation, an update with learning rate `rate`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.backward(loss)
        keep = self.keep_norm and self.engine.is_gradient_accumulation_boundary()
        if keep and not measures_norm(self.engine):
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self.last_norm = torch.nn.utils.get_total_norm(gradients)
        self.engine.step()
        if keep and measures_norm(self.engine):
            self.last_norm = gradient_norm(self.engine)

    def skipped_updates(self) -> int:
        """Updates skipped by us or by DeepSpeed, since a gradient was not finite. Waits for the device."""
        return int(self.adam.skipped) + self.engine.skipped_steps

    def _some_weights(self) -> Tensor:
        """The first master weights of this rank's largest slice (the network's own if they are on NVMe): a copy."""
        weights = self.local() if swaps_to_nvme(self.engine) else self.masters.local()
        largest = max(weights, key=lambda t: t.numel())
        return largest.reshape(-1)[:WATCHED].to(self.world.device, torch.float32, copy=True)

    def update_ratio(self) -> Tensor:
        """|change| / |weights| since the last call, of some of this rank's weights: a scalar on the device. NaN at the first
        call after resharding, when there is nothing to compare with."""
        now = self._some_weights()
        if self._weights_at_line is None:
            ratio = torch.tensor(torch.nan, device=now.device)
        else:
            ratio = (now - self._weights_at_line).norm() / now.norm().clamp_min(1e-12)
        self._weights_at_line = now
        return ratio

    def watch_state(self) -> dict:
        """For checkpoints: what the metrics of a resumed run need. Waits for the device."""
        norm = None if self.last_norm is None else float(self.last_norm)
        return {"skipped": self.adam.skipped, "weights": self._weights_at_line, "norm": norm}

    def load_watch_state(self, state: dict) -> None:
        self.adam.skipped.copy_(state["skipped"])
        self._weights_at_line = None if state["weights"] is None else self._weights_at_line.copy_(state["weights"])
        self.last_norm = state["norm"]

    def local(self) -> list[Tensor]:
        """The weights that this rank owns: 1/N of every parameter, flat; see trainer.engine.weight_slices.Slice."""
        return self.weights.local()

    @contextmanager
    def averaged(self, values: list[Tensor]):
        """Gives the network averaged weights within the block; then the training weights come back, bit for bit. values: an
        average of `masters.local`. Every rank must enter it."""
        live = [t.clone() for t in self.local()]
        self.masters.layout.write(values)
        try:
            yield self
        finally:
            self.weights.write(live)

    def state_dict(
        self, masters: list[Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor] | None:
        """A copy of the whole network's (or adapter's) weights in host memory on rank 0; None on the others. Every rank must
        call it. masters: `masters.local` or an average of it; default: the live weights. dtype: default: theirs."""
        dtype = dtype or self.weights.slices[0].parameter.dtype
        return self.weights.copy(dtype) if masters is None else self.masters.layout.gather(masters, dtype)

    def snapshot(self, masters: list[Tensor] | None = None, dtype: torch.dtype | None = None) -> Snapshot | None:
        """The same as something to write: the network's folder, or the adapter's LoRA folder."""
        state = self.state_dict(masters, dtype)
        if state is None:
            return None
        if self.adapter:
            return Snapshot.of_adapter(state, self.module, self.base)
        return Snapshot.of_network(state, self.config)

    def save_engine(self, folder: Path, write: Callable[[object, Path], None]) -> None:
        """Writes weights and optimizer to folder/NAME in DeepSpeed's format, each file by `write(state, file)`. Every rank
        must call it.

        Frozen weights below an adapter stay out: DeepSpeed saves those of ZeRO-3 in pieces that it loses on resume
        (DeepSpeed#3090, #5439), and the pipeline folder has them, known by their hash.
        """
        write_files_with(self.engine, write)
        self.engine.save_checkpoint(
            str(folder), tag=self.name, save_latest=False, exclude_frozen_parameters=self.adapter
        )

    def load_engine(self, folder: Path) -> bool:
        """Reads what `save_engine` wrote; False if there is nothing. Raises RuntimeError if the files have other parameters,
        and whatever DeepSpeed raises for damaged ones."""
        strict = load_trained if self.adapter else None
        loaded, _ = self.engine.load_checkpoint(str(folder), tag=self.name, custom_load_fn=strict)
        return loaded is not None


def skipped_updates(roles: dict[str, Role]) -> int:
    """Updates skipped so far, over all roles. Waits for the device."""
    return sum(role.skipped_updates() for role in roles.values() if role.trained)


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Loads a state dict of exactly the trained parameters; the frozen ones stay. Raises RuntimeError."""
    frozen = {name for name, p in dst.named_parameters() if not p.requires_grad}
    wrong = dst.load_state_dict(src, strict=False)
    if wrong.unexpected_keys or set(wrong.missing_keys) != frozen:
        missing = sorted(set(wrong.missing_keys) - frozen)
        raise RuntimeError(f"missing {missing[:3]}, unexpected {wrong.unexpected_keys[:3]}")


def _own_parameters(module: nn.Module, network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a role trains, by their names in files: all of the module, or, if the network in it carries an
    adapter, the adapter's and those around the network."""
    adapter = adapter_parameters(network)
    if not adapter:
        return dict(module.named_parameters())
    inside = {id(p) for p in network.parameters()}
    return adapter | {name: p for name, p in module.named_parameters() if id(p) not in inside}
