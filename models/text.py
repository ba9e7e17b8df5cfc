"""Captions to text states, with the pipeline's own encoders."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from models.conditioning import Conditioning, square_time_ids
from models.pipeline import load_text


class TextEncoder:
    """Encodes captions with the two text encoders of an SDXL pipeline folder, as the diffusers pipeline does.

    A caption that comes again is not encoded again: the last `remember` captions are kept on the device
    (about 0.3 MB each for SDXL).
    """

    def __init__(self, pipeline: Path, dtype: torch.dtype, device: torch.device, remember: int = 256):
        self.parts = load_text(pipeline, dtype, device)
        self.device = device
        self.remember = remember
        self._known: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @torch.no_grad()
    def encode(self, captions: list[str], time_ids: Tensor | int) -> Conditioning:
        """Conditioning of B captions; time_ids: [B, 6], or the resolution in pixels of uncropped square images."""
        new = list(dict.fromkeys(c for c in captions if c not in self._known))
        fresh = {}
        if new:
            states, _, pooled, _ = self.parts.encode_prompt(new, device=self.device, do_classifier_free_guidance=False)
            fresh = {c: (states[i], pooled[i]) for i, c in enumerate(new)}
        rows = [fresh[c] if c in fresh else self._known[c] for c in captions]
        self._known.update(fresh)
        while len(self._known) > self.remember:
            self._known.popitem(last=False)
        if isinstance(time_ids, int):
            time_ids = square_time_ids(len(captions), time_ids, self.device)
        return Conditioning(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]), time_ids)
