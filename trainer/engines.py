"""Roles as DeepSpeed engines: teacher (and target), generator, fake score. Engines only run networks."""

import json
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn

from models.ema import Ema
from models.lora import adapter_parameters
from trainer.distributed import World
from trainer.errors import UserError
from trainer.optimizer import GuardedAdamW
from trainer.schedules import OptimizerSettings
from trainer.weights import Slice

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
# These have one owner, the YAML: a DeepSpeed JSON that says otherwise would silently win.
OURS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "clip",
    "bf16": "precision",
    "fp16": "precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
}

PROBE = 1 << 16  # weights a role that `update_ratio` looks at


def micro_batch(batch: int, accumulation: int, world: World, where: str) -> int:
    """The samples of one rank in one micro-step. Raises UserError if the global batch does not divide."""
    parts = world.size * accumulation
    if batch % parts:
        near = max(batch // parts, 1) * parts
        raise UserError(
            f"{where}.batch={batch} does not divide into {world.size} processes x {accumulation} accumulation steps: "
            f"use {near} or another multiple of {parts}"
        )
    return batch // parts


def deepspeed_config(name: str, micro: int, accumulation: int, clip: float, precision: str, world: World) -> dict:
    """The one place where a DeepSpeed JSON and the YAML's settings meet.

    name: a file of `ds_configs/` without its ending, or a path. Raises UserError for a missing or broken file and for
    a key that is the YAML's.
    """
    file = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        known = ", ".join(sorted(f.stem for f in DS_CONFIGS.glob("*.json")))
        raise UserError(
            f"DeepSpeed configuration {file} cannot be read ({error.strerror}); known names: {known}"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"DeepSpeed configuration {file} is not JSON: {error}") from error
    for key, owner in OURS.items():
        if key in config:
            raise UserError(f"{file}: '{key}' is set by `{owner}` in the YAML: remove it from the JSON")
    return config | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world.size,
        "gradient_clipping": clip,
        "bf16": {"enabled": precision == "bf16"},
        # Ours to log; DeepSpeed's own lines would synchronise the device.
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
    }


class Role:
    """One network under DeepSpeed, trained (with an optimizer) or frozen (without).

    Of a network with a LoRA adapter, only the adapter is trained, sliced, averaged, switched and saved: its base stays
    as it was loaded, in the engine's precision, and has no optimizer state.

    Call it for a forward pass. `module` is the bare network, for terms that need autograd to an input only. `config` is
    the network's own configuration, as its weights folder has it.
    """

    def __init__(
        self, name: str, network: nn.Module, config: dict, world: World, optimizer: OptimizerSettings | None = None
    ):
        self.name, self.world, self.config = name, world, dict(getattr(network, "config", {}))
        self.trained = optimizer is not None
        stage = config["zero_optimization"]["stage"]
        if not self.trained and stage not in (0, 3):
            raise UserError(f"{name}: a frozen role runs at ZeRO stage 0 or 3, not {stage}: use zero0 or teacher")
        self.adapter = bool(adapter_parameters(network))
        network.requires_grad_(False).train(self.trained)
        weights = list(self._weights(network).values())
        for parameter in weights:
            parameter.requires_grad_(self.trained)
        adam = None
        if optimizer is not None:
            adam = GuardedAdamW(weights, optimizer, world)
        self.adam = adam
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=network, optimizer=adam, config=config)
        self.stage = stage
        self.slices = [Slice(key, p, world) for key, p in self._weights(self.engine.module).items()]
        self._probe = self._some_weights()

    def _weights(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The role's own parameters by their names in files: the adapter's, if there is one, else all."""
        return adapter_parameters(network) if self.adapter else dict(network.named_parameters())

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.engine(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

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
        """|change| / |weights| of some of this rank's weights since the last call: a scalar on the device."""
        now = self._some_weights()
        ratio = (now - self._probe).norm() / now.norm().clamp_min(1e-12)
        self._probe = now
        return ratio

    def watch_state(self) -> dict:
        """What `skipped_updates` and `update_ratio` remember, for the run state."""
        return {"skipped": self.adam.skipped, "probe": self._probe}

    def load_watch_state(self, state: dict) -> None:
        self.adam.skipped.copy_(state["skipped"])
        if state["probe"].shape == self._probe.shape:  # another world size cuts the weights elsewhere
            self._probe.copy_(state["probe"])

    def local(self) -> list[Tensor]:
        """This rank's slices of the weights: all of every tensor below ZeRO-3, its own part under it."""
        return [s.tensor for s in self.slices]

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        """Overwrites this rank's slices with tensors of the same shapes. Below ZeRO-3 every rank must write alike."""
        for s, value in zip(self.slices, values, strict=True):
            s.write(value)

    @contextmanager
    def averaged(self, ema: Ema):
        """The network with the averaged weights, for the time of the block; training weights come back to the bit."""
        kept = [t.clone() for t in self.local()]
        self.write(ema.shadow)
        try:
            yield self
        finally:
            self.write(kept)

    def state_dict(self) -> dict[str, Tensor] | None:
        """A copy of the whole network's weights, or of the adapter's if there is one, on rank 0 (host memory), None on
        the others. Every rank must call it."""
        if self.adapter:
            with deepspeed.zero.GatheredParameters([s.parameter for s in self.slices], enabled=self.stage == 3):
                return {
                    s.key: s.parameter.detach().to("cpu", copy=True) for s in self.slices if self.world.main
                } or None
        if self.stage == 3:
            whole = self.engine._zero3_consolidated_16bit_state_dict()
        else:
            whole = self.module.state_dict() if self.world.main else None
        if whole is None:
            return None
        # Always a copy: on a CPU .cpu() gives the live weights, and the averaged ones would change back under the caller.
        return {key: value.detach().to("cpu", copy=value.device.type == "cpu") for key, value in whole.items()}

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


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Loads a state dict of exactly the trained parameters into a network; the frozen ones stay. Raises RuntimeError."""
    frozen = {name for name, p in dst.named_parameters() if not p.requires_grad}
    wrong = dst.load_state_dict(src, strict=False)
    if wrong.unexpected_keys or set(wrong.missing_keys) != frozen:
        missing = sorted(set(wrong.missing_keys) - frozen)
        raise RuntimeError(f"missing {missing[:3]}, unexpected {wrong.unexpected_keys[:3]}")
