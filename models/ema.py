"""Exponential moving average of weights in float32. Which slices a rank owns: trainer.engine.weight_slices; how a saved average
is resharded: trainer.training.state_parts."""

import torch
from torch import Tensor


class Ema:
    """Averages a list of tensors in place: the slices of the weights that this rank owns, so that the average is
    sharded over the ranks and costs no communication."""

    def __init__(self, tensors: list[Tensor], decay: float):
        self.decay = decay
        self.shadow = [t.detach().float().clone() for t in tensors]

    @torch.no_grad()
    def update(self, tensors: list[Tensor]) -> None:
        """shadow <- decay * shadow + (1 - decay) * tensors."""
        live = [t.detach() if t.dtype == torch.float32 else t.detach().float() for t in tensors]
        torch._foreach_lerp_(self.shadow, live, 1 - self.decay)

    def state_dict(self) -> dict:
        return {"decay": self.decay, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state belongs to other shapes."""
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            if mine.shape != saved.shape:
                raise ValueError(f"EMA slice of shape {tuple(saved.shape)} where {tuple(mine.shape)} is expected")
            mine.copy_(saved)
