"""Exponential moving average of weights in float32. Which weights a rank averages: trainer.engine.masters; how a saved average
is resharded: trainer.training.state_parts."""

import torch
from torch import Tensor


class Ema:
    """Averages a list of float32 tensors in place: the master weights that this rank owns, so that the average is sharded
    over the ranks and costs no communication. device: of the average, if not the tensors' own. warmup: the decay grows with
    the number of updates, so that the first weights are soon forgotten."""

    def __init__(self, tensors: list[Tensor], decay: float, device: torch.device | None = None, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self.shadow = [t.detach().to(device or t.device, torch.float32, copy=True) for t in tensors]

    @torch.no_grad()
    def update(self, tensors: list[Tensor], earlier: int | None = None) -> None:
        """shadow <- decay * shadow + (1 - decay) * tensors. earlier: the number of updates before this one, n, which a
        warm-up needs: the decay is then at most (n + 1) / (n + 10)."""
        decay = min(self.decay, (earlier + 1) / (earlier + 10)) if self.warmup else self.decay
        if all(mine.device == t.device for mine, t in zip(self.shadow, tensors, strict=True)):
            torch._foreach_lerp_(self.shadow, tensors, 1 - decay)
            return
        for mine, t in zip(self.shadow, tensors, strict=True):  # one by one: no second copy of all on the device
            # The host does not wait for the copy. The next update of `t` comes after a backward pass, which does.
            mine.lerp_(t.to(mine.device, non_blocking=True), 1 - decay)

    def state_dict(self) -> dict:
        return {"decay": self.decay, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state belongs to other shapes."""
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            if mine.shape != saved.shape:
                raise ValueError(f"EMA slice of shape {tuple(saved.shape)} where {tuple(mine.shape)} is expected")
            mine.copy_(saved)
