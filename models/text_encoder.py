"""Encoding of captions with a pipeline's own text encoders."""

import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerBase

from models.conditioning import Conditioning, uncropped_time_ids
from models.families import family_of
from models.files import read_json
from models.offload import on_device, to_device
from models.pipeline import load_text, text_encoders

Size = tuple[int, int]  # height, width


def _not_about_length(record: logging.LogRecord) -> bool:
    """A filter for the loggers of tokenizers and pipelines: they would warn of every batch with a long caption, once per text
    encoder and rank. `TextEncoder.truncated` counts these captions instead."""
    text = str(record.msg)
    return "was truncated because" not in text and "sequence length is longer than" not in text


class _CopiesWithoutWaiting(TorchFunctionMode):
    """Within it `tensor.to(device)` copies from pinned host memory and does not wait. A pipeline copies each encoder's token
    ids with it, and a GPU would have to finish all that it was given before."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.to and len(args) == 2 and isinstance(args[1], torch.device) and not kwargs:
            return to_device(*args)
        return function(*args, **(kwargs or {}))


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
        self.tokenizers = self._distinct_tokenizers(names)
        for logger in (type(self.parts).__module__, PreTrainedTokenizerBase.__module__):
            logging.getLogger(logger).addFilter(_not_about_length)
        self.empty = None if self.family.empty_is_zero(self.parts) else self._text([""])

    @property
    def tokens(self) -> int:
        """Length of the token sequence, including padding."""
        return self.family.tokens(self.parts)

    def _distinct_tokenizers(self, encoders: list[str]) -> list[tuple[PreTrainedTokenizerBase, int]]:
        """Tokenizers and the number of tokens that their encoders take, without those that split captions as one before (SDXL's
        second pads with another token)."""
        found: dict[tuple, tuple[PreTrainedTokenizerBase, int]] = {}
        for encoder in encoders:
            tokenizer = getattr(self.parts, encoder.replace("text_encoder", "tokenizer"))
            # SD3's optional T5 takes as many tokens as the family asks the pipeline for.
            limit = tokenizer.model_max_length if encoder in self.family.encoders else self.family.extra_tokens
            found.setdefault((type(tokenizer), limit, frozenset(tokenizer.get_vocab().items())), (tokenizer, limit))
        return list(found.values())

    def truncated(self, captions: list[str]) -> int:
        """How many of these captions have more tokens than one of the text encoders takes: it does not see their end."""
        long: set[int] = set()
        for tokenizer, limit in self.tokenizers:
            # No token of ASCII text has less than a character, and two are added at most: short captions cost nothing.
            rows = [row for row, text in enumerate(captions) if len(text) > limit - 2 or not text.isascii()]
            ids = tokenizer([captions[row] for row in rows], verbose=False).input_ids if rows else []
            long.update(row for row, tokens in zip(rows, ids, strict=True) if len(tokens) > limit)
        return len(long)

    @torch.no_grad()
    def _text(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        with on_device(self.encoders, self.device), _CopiesWithoutWaiting():
            return self.family.encode(self.parts, captions, self.device)

    def encode(self, captions: list[str], time_ids: Tensor | Size) -> Conditioning:
        """The conditioning of B captions. time_ids: [B, 6], or the size (height, width) in pixels of uncropped
        images; ignored by families without time ids."""
        return self.conditioning(*self._text(captions), time_ids)

    def encode_or_load(self, captions: list[str], encoded: dict[str, Tensor], time_ids: Tensor | Size) -> Conditioning:
        """The conditioning of captions, from their encoded text ("states", "pooled") if there is any; time_ids as in
        `encode`."""
        if "states" not in encoded:
            return self.encode(captions, time_ids)
        states, pooled = (
            value if value is None else to_device(value, self.device).to(self.dtype)
            for value in (encoded["states"], encoded.get("pooled"))
        )
        return self.conditioning(states, pooled, time_ids)

    def conditioning(self, states: Tensor, pooled: Tensor | None, time_ids: Tensor | Size) -> Conditioning:
        """The conditioning from text states [B, L, D] and pooled text [B, P] of this pipeline; time_ids as in
        `encode`."""
        batch = len(states)
        if not self.family.uses_time_ids():
            time_ids = None
        elif isinstance(time_ids, tuple):
            time_ids = uncropped_time_ids(batch, time_ids, self.device)
        empty_states, empty_pooled = self.empty or (None, None)
        if empty_states is not None:
            empty_states = empty_states.expand(batch, -1, -1)
        if empty_pooled is not None:
            empty_pooled = empty_pooled.expand(batch, -1)
        return Conditioning(states, pooled, time_ids, empty_states, empty_pooled, self.family.name)
