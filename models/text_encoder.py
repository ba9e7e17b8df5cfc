"""Encoding of captions with a pipeline's own text encoders."""

from pathlib import Path

import torch
from torch import Tensor

from models.conditioning import Conditioning, square_time_ids
from models.families import family_of, read_json
from models.offload import on_device
from models.pipeline import load_text, text_encoders


class TextEncoder:
    """Encodes captions with the text encoders of a pipeline folder, as the diffusers pipeline does.

    A batch is always encoded as a whole. Caching captions would save little (they rarely repeat in a large set) and
    break exact resumption: the last bit of a state depends on its batch, and a resumed run would start with an empty
    cache. The empty caption is encoded once, alone, unless it is all zeros.
    """

    def __init__(self, pipeline: Path, dtype: torch.dtype, device: torch.device, variant: str = ""):
        self.family = family_of(pipeline)
        self.parts = load_text(pipeline, dtype, device, variant)
        self.device, self.dtype = device, dtype
        names = text_encoders(read_json(Path(pipeline) / "model_index.json"))
        self.encoders = [getattr(self.parts, name) for name in names]
        self.empty = None if self.family.empty_is_zero(self.parts) else self._text([""])

    @property
    def tokens(self) -> int:
        """Length of the token sequence, including padding."""
        return self.family.tokens(self.parts)

    @torch.no_grad()
    def _text(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        with on_device(self.encoders, self.device):
            return self.family.encode(self.parts, captions, self.device)

    def encode(self, captions: list[str], time_ids: Tensor | int) -> Conditioning:
        """The conditioning of B captions. time_ids: [B, 6], or the resolution in pixels of uncropped square images;
        ignored by families without time ids."""
        return self.conditioning(*self._text(captions), time_ids)

    def encode_or_load(self, captions: list[str], encoded: dict[str, Tensor], time_ids: Tensor | int) -> Conditioning:
        """The conditioning of captions, from their encoded text ("states", "pooled") if there is any; time_ids as in
        `encode`."""
        if "states" not in encoded:
            return self.encode(captions, time_ids)
        states, pooled = (
            value if value is None else value.to(self.device, self.dtype, non_blocking=True)
            for value in (encoded["states"], encoded.get("pooled"))
        )
        return self.conditioning(states, pooled, time_ids)

    def conditioning(self, states: Tensor, pooled: Tensor | None, time_ids: Tensor | int) -> Conditioning:
        """The conditioning from text states [B, L, D] and pooled text [B, P] of this pipeline; time_ids as in
        `encode`."""
        batch = len(states)
        if not self.family.uses_time_ids():
            time_ids = None
        elif isinstance(time_ids, int):
            time_ids = square_time_ids(batch, time_ids, self.device)
        empty_states, empty_pooled = self.empty or (None, None)
        if empty_states is not None:
            empty_states = empty_states.expand(batch, -1, -1)
        if empty_pooled is not None:
            empty_pooled = empty_pooled.expand(batch, -1)
        return Conditioning(states, pooled, time_ids, empty_states, empty_pooled, self.family.name)
