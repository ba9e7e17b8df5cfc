"""The conditioning of a denoising network besides x_t and t: text states, pooled text and SDXL's time ids."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a batch. Families without pooled text or time ids have None there.

    states: text states [B, L, D]. pooled: pooled text [B, P]. time_ids: [B, 6], original size (height, width), crop
    corner (top, left), target size (height, width), in pixels (SDXL, Podell et al. 2023, section 2.2).
    empty_states, empty_pooled: those of the empty caption, in the same shapes; None if all zeros.
    family: name of the model family (models.families).
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    empty_states: Tensor | None = None
    empty_pooled: Tensor | None = None
    family: str = "sdxl"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name; the first dimension of each is the batch."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Applies a function to every tensor."""
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})

    def unconditional(self) -> "Conditioning":
        """The conditioning of the empty caption."""
        states = torch.zeros_like(self.states) if self.empty_states is None else self.empty_states
        pooled = self.empty_pooled
        if pooled is None and self.pooled is not None:
            pooled = torch.zeros_like(self.pooled)
        return replace(self, states=states, pooled=pooled)

    def dropped(self, mask: Tensor) -> "Conditioning":
        """Replaces captions by the empty one where the boolean mask [B] is true (classifier-free guidance training)."""
        empty = self.unconditional()
        states = torch.where(mask[:, None, None], empty.states, self.states)
        pooled = None if self.pooled is None else torch.where(mask[:, None], empty.pooled, self.pooled)
        return replace(self, states=states, pooled=pooled)

    def doubled(self) -> "Conditioning":
        """Stacks [unconditional; conditional] along the batch, for guidance in one network call."""
        empty = self.unconditional()
        pairs = {name: torch.cat([getattr(empty, name), value]) for name, value in self.tensors().items()}
        return replace(self, **pairs)


def uncropped_time_ids(batch: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Time ids [B, 6] of uncropped images of a size (height, width) in pixels, the default of the diffusers pipeline."""
    return _uncropped_row(size, device).expand(batch, 6)


@cache
def _uncropped_row(size: tuple[int, int], device: torch.device) -> Tensor:
    """Kept on the device: a copy from host memory would wait for it in every micro-batch."""
    return torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=device)


def image_time_ids(original_sizes: Tensor, crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Time ids [B, 6] of training images of a size (height, width) with original sizes [B, 2] and crop corners [B, 2], in
    pixels."""
    target = torch.stack([torch.full_like(original_sizes[:, 0], side) for side in size], dim=1)
    return torch.cat([original_sizes, crops, target], dim=1).float()
