"""Tokenizers without a download: CLIP's, from the vocabulary in open_clip, and a T5 tokenizer of single letters."""

import gzip
import string
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, CLIPTokenizer, T5Tokenizer

from models.errors import ModelError

VOCABULARY = 49408  # 256 bytes + 256 bytes that end a word + 48,894 merges + start and end
START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : VOCABULARY - 512 - 2 + 1]]  # line 0 is a header
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(m) for m in merges] + [START, END]
    return {word: i for i, word in enumerate(words)}, merges


def clip_tokenizer(max_length: int, pad_token: str = END) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer for texts of `max_length` tokens. SDXL's first tokenizer pads with the end token, its
    second with "!" (id 0)."""
    vocabulary, merges = _vocabulary()
    tokenizer = CLIPTokenizer(
        vocab=dict(vocabulary),
        merges=list(merges),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad_token,
        model_max_length=max_length,
    )
    if len(tokenizer) != VOCABULARY:  # with unexpected arguments, transformers silently builds a two-word tokenizer
        raise RuntimeError(f"CLIP tokenizer has {len(tokenizer)} entries instead of {VOCABULARY}")
    return tokenizer


class TokenCounter:
    """Counts the tokens of captions, by the tokenizer of a pipeline folder that makes the most of them.

    limit: tokens that every text encoder of the pipeline reads; the rest of a caption is cut.
    """

    def __init__(self, pipeline: Path):
        """Raises ModelError if the folder has no tokenizer."""
        folders = sorted(folder for folder in pipeline.glob("tokenizer*") if folder.is_dir())
        if not folders:
            raise ModelError(f"{pipeline} has no tokenizer: name a pipeline folder")
        self._tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
        self.limit = min(tokenizer.model_max_length for tokenizer in self._tokenizers)

    def __call__(self, caption: str) -> int:
        """Tokens of a caption, start and end included."""
        return max(len(tokenizer(caption, verbose=False).input_ids) for tokenizer in self._tokenizers)


def letter_tokenizer(max_length: int) -> T5Tokenizer:
    """A T5 tokenizer that splits a text into letters; all characters but a to z are unknown tokens."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=max_length)
