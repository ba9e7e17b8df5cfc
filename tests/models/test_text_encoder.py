"""Long captions are counted and not warned about; encoding text does not wait for the device."""

import logging
import random

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.text_encoder import TextEncoder

CPU = torch.device("cpu")
LONG = "seven " * 300  # longer than the 256 tokens of SD3's T5
CAPTIONS = ["a seven", LONG, "", LONG + "or nine"]


class BlockingCopies(TorchDispatchMode):
    """Copies from host memory to the meta device, here in the place of a GPU, that would wait for it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.made = MadeOnDevice(self.found)

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.made.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        source = args[1] if function is torch.ops.aten.copy_.default else args[0] if args else None
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        waits = copies and not (kwargs or {}).get("non_blocking")
        if waits and source.device.type == "cpu" and out.device.type == "meta":
            self.found.append(f"{function} {tuple(source.shape)}")
        return out


class MadeOnDevice(TorchFunctionMode):
    """Tensors made of Python's numbers: copies, too, but not for the dispatcher."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and out.device.type == "meta":
            self.found.append(f"{function.__name__} {tuple(out.shape)}")
        return out


@pytest.fixture
def warned():
    """What libraries and the root logger say while a test runs."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    names = ("", "diffusers", "transformers")  # the libraries' loggers do not propagate
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield records
    for name in names:
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("kind", ["sdxl", "sd15", "sd3"])
def test_long_captions_are_counted(pipelines, kind, warned):
    text = TextEncoder(pipelines[kind], torch.float32, CPU)
    for _ in range(2):
        text.encode(CAPTIONS, (8, 8))
    assert not warned
    assert text.truncated(CAPTIONS) == 2 and text.truncated(["a seven", ""]) == 0
    assert len(text.tokenizers) == (2 if kind == "sd3" else 1)  # SDXL's two, and SD3's first two, split alike
    rng = random.Random(0)
    for _ in range(100):  # exactly those that lose something
        caption = "".join(rng.choice("aab c1.é") for _ in range(rng.randrange(330)))
        ids = [(tokenizer(caption, verbose=False).input_ids, limit) for tokenizer, limit in text.tokenizers]
        assert text.truncated([caption]) == any(len(tokens) > limit for tokens, limit in ids)


@pytest.mark.parametrize("kind", ["sdxl", "sd15", "sd3"])
def test_encoding_does_not_wait_for_the_device(pipelines, kind):
    text = TextEncoder(pipelines[kind], torch.float32, torch.device("meta"))
    text.encode(CAPTIONS, (8, 8))  # the time ids' row of a resolution is made once
    stored = {"states": torch.zeros(4, 16, 16), "pooled": torch.zeros(4, 16)}
    with BlockingCopies() as copies:
        cond = text.encode(CAPTIONS, (8, 8))
        text.encode_or_load(CAPTIONS, stored, (8, 8))
    assert cond.states.device.type == "meta" and not copies.found


def test_the_watch_sees_copies():
    device = torch.device("meta")
    with BlockingCopies() as copies:
        torch.zeros(2).to(device)
        torch.zeros(3, device=device).copy_(torch.zeros(3))
        torch.tensor([1.0], device=device)
        torch.zeros(4).to(device, non_blocking=True)
    assert [line.split()[-1] for line in copies.found] == ["(2,)", "(3,)", "(1,)"]


def test_a_row_of_time_ids_is_kept(pipelines):
    text = TextEncoder(pipelines["sdxl"], torch.float32, CPU)
    one, other = (text.encode(["a"] * n, (8, 8)).time_ids for n in (2, 3))
    assert isinstance(one, Tensor) and one.data_ptr() == other.data_ptr()
    assert one.tolist() == [[8, 8, 0, 0, 8, 8]] * 2 and other.shape == (3, 6)
    assert text.encode(["a"], (16, 16)).time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
