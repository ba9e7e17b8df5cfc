"""Captions to text states, with the pipeline's own encoders."""

from pathlib import Path

import torch
from torch import Tensor

from models.conditioning import Conditioning, square_time_ids
from models.pipeline import load_text


class TextEncoder:
    """Encodes captions with the two text encoders of an SDXL pipeline folder, as the diffusers pipeline does.

    A batch is always encoded whole. Remembering captions would save little (they seldom come twice in a large set) and
    cost exactness: the last bit of a state depends on the batch that it is computed in, and a resumed run would not
    remember what the first one did.
    """

    def __init__(self, pipeline: Path, dtype: torch.dtype, device: torch.device):
        self.parts = load_text(pipeline, dtype, device)
        self.device = device

    @property
    def tokens(self) -> int:
        """Length of the token sequence, padding included."""
        return self.parts.tokenizer.model_max_length

    @torch.no_grad()
    def encode(self, captions: list[str], time_ids: Tensor | int) -> Conditioning:
        """Conditioning of B captions; time_ids: [B, 6], or the resolution in pixels of uncropped square images."""
        if isinstance(time_ids, int):
            time_ids = square_time_ids(len(captions), time_ids, self.device)
        states, _, pooled, _ = self.parts.encode_prompt(captions, device=self.device, do_classifier_free_guidance=False)
        return Conditioning(states, pooled, time_ids)
