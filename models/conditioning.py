"""What a denoising network is told besides x_t and t: text states, pooled text and SDXL's time ids."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """states: [B, L, D] text states; pooled: [B, P] pooled text; time_ids: [B, 6] original size (height, width),
    crop corner (top, left), target size (height, width), in pixels (SDXL, Podell et al. 2023, section 2.2)."""

    states: Tensor
    pooled: Tensor
    time_ids: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning(function(self.states), function(self.pooled), function(self.time_ids))

    def unconditional(self) -> "Conditioning":
        """The empty caption. SDXL base sets `force_zeros_for_empty_prompt`: no text is all zeros, not an encoded ""."""
        return Conditioning(torch.zeros_like(self.states), torch.zeros_like(self.pooled), self.time_ids)

    def dropped(self, mask: Tensor) -> "Conditioning":
        """Captions dropped where the boolean mask [B] is true (classifier-free guidance training)."""
        keep = (~mask).to(self.states.dtype)
        return Conditioning(self.states * keep[:, None, None], self.pooled * keep[:, None], self.time_ids)

    def doubled(self) -> "Conditioning":
        """[unconditional; conditional] stacked along the batch, for guidance in one network call."""
        empty = self.unconditional()
        return Conditioning(
            torch.cat([empty.states, self.states]),
            torch.cat([empty.pooled, self.pooled]),
            torch.cat([empty.time_ids, self.time_ids]),
        )


def square_time_ids(batch: int, resolution: int, device: torch.device) -> Tensor:
    """Time ids [B, 6] of an uncropped square image: what the diffusers pipeline uses by default when it samples."""
    row = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32, device=device)
    return row.expand(batch, 6)


def image_time_ids(original_sizes: Tensor, crops: Tensor, resolution: int) -> Tensor:
    """Time ids [B, 6] of training images with original sizes [B, 2] and crop corners [B, 2], in pixels."""
    target = torch.full_like(original_sizes, resolution)
    return torch.cat([original_sizes, crops, target], dim=1).float()
