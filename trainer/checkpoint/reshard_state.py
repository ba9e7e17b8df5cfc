"""Redistribution of the ranks' own state to another number of ranks. Pure functions."""

import torch
from torch import Tensor

from data.sampling_order import BatchSplit

Ranges = list[tuple[int, int]]


def reslice(saved: list[list[Tensor]], ranges: list[Ranges], wanted: Ranges) -> list[Tensor]:
    """Pieces of a list of tensors, reassembled along other cuts.

    saved[r][i]: rank r's piece of tensor i: the elements ranges[r][i] of it, counted flat. Returns the elements `wanted[i]`
    of each tensor, flat. Where ranks hold the same elements, those of the first are taken. Raises ValueError if no rank has
    some of them.
    """
    made = []
    for i, (start, end) in enumerate(wanted):
        parts, at = [], start
        for low, high, piece in sorted(((*ranges[r][i], saved[r][i]) for r in range(len(saved))), key=lambda p: p[:2]):
            if low <= at < min(high, end):
                parts.append(piece.reshape(-1)[at - low : min(high, end) - low])
                at = min(high, end)
        if at < end:
            raise ValueError(f"tensor {i}: no rank has its elements from {at} on")
        made.append(torch.cat(parts) if parts else saved[0][i].new_empty(0))
    return made


def redeal(
    parts: list[list[dict[str, Tensor]]], old: BatchSplit, new: BatchSplit, rank: int
) -> list[dict[str, Tensor]]:
    """Rows of micro-batches, redistributed to another split of the same global batch.

    parts[r][p]: tensors of rank r's micro-batch p, one row per sample. Returns the micro-batches of `rank` in the new split.
    """
    if not parts[0]:
        return []
    order = [parts[r][p] for p in range(old.accumulation) for r in range(old.world)]
    whole = {key: torch.cat([part[key] for part in order]) for key in order[0]}
    rows = [list(new.rows(part, rank)) for part in range(new.accumulation)]
    return [{key: value[chosen] for key, value in whole.items()} for chosen in rows]
