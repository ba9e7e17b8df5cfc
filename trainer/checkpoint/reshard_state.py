"""The state of the ranks of one run, dealt out again to another number of ranks. Pure functions."""

import torch
from torch import Tensor

from data.sampling_order import Split

Ranges = list[tuple[int, int]]


def reslice(saved: list[list[Tensor]], ranges: list[Ranges], wanted: Ranges) -> list[Tensor]:
    """Flat pieces of a list of tensors, cut anew.

    saved[r][i]: rank r's piece of tensor i, which has the elements ranges[r][i] of it, counted flat. Returns for each
    tensor the elements `wanted[i]`, flat. Ranks may hold the same elements (the first one's are taken). Raises
    ValueError if nobody has some of them.
    """
    made = []
    for i, (start, end) in enumerate(wanted):
        parts, at = [], start
        for low, high, piece in sorted(((*ranges[r][i], saved[r][i]) for r in range(len(saved))), key=lambda p: p[:2]):
            if low <= at < min(high, end):
                parts.append(piece.reshape(-1)[at - low : min(high, end) - low])
                at = min(high, end)
        if at < end:
            raise ValueError(f"tensor {i}: nobody has its elements from {at} on")
        made.append(torch.cat(parts) if parts else saved[0][i].new_empty(0))
    return made


def redeal(parts: list[list[dict[str, Tensor]]], old: Split, new: Split, rank: int) -> list[dict[str, Tensor]]:
    """Rows of micro-batches, dealt to another split of the same global batch.

    parts[r][p]: tensors of rank r's micro-batch p, a row a sample. Returns those of `rank` in the new split.
    """
    if not parts[0]:
        return []
    order = [parts[r][p] for p in range(old.accumulation) for r in range(old.world)]
    whole = {key: torch.cat([part[key] for part in order]) for key in order[0]}
    rows = [list(new.rows(part, rank)) for part in range(new.accumulation)]
    return [{key: value[chosen] for key, value in whole.items()} for chosen in rows]


def merge_meters(states: list[dict], old: Split, new: Split) -> dict:
    """The meters that give every rank the mean over the ranks that saved `states`, one value a micro-step. With another
    accumulation a micro-step counts in proportion, so that the interval's mean stays one over steps."""
    scale = new.accumulation / old.accumulation
    counts = states[0]["counts"]
    sums = {name: sum(float(s["sums"][name]) for s in states) / len(states) * scale for name in counts}
    return {"sums": sums, "counts": {name: count * scale for name, count in counts.items()}}
