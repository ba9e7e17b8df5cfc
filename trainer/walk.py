"""Which node of the path is the target at which step."""

from bisect import bisect_right
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WalkSettings(BaseModel):
    """fixed: a switch every `interval` generator updates. adaptive: a switch when the mismatch has fallen below
    `share` of its value at the last switch, but not before `interval` and not after `most` updates on one node."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["fixed", "adaptive"] = "fixed"
    interval: int = Field(1000, ge=1)
    share: float = Field(0.7, gt=0, lt=1)
    most: int = Field(2000, ge=1)


def fixed_switches(nodes: int, interval: int) -> list[int]:
    """The generator updates at which the target of a path with `nodes` nodes (node 0 included) moves on."""
    return [interval * k for k in range(1, nodes - 1)]


def target(update: int, nodes: int, switches: list[int]) -> int:
    """The index of the target node at a generator update (from 0): a pure function of the switches.

    It starts at node N-1 = nodes - 2 (the fake score starts from node N), moves one node nearer to the teacher at each
    switch, ends at node 0, the teacher, and stays there (DisBack, algorithm 2).
    """
    return max(nodes - 2 - bisect_right(sorted(switches), update), 0)


def moves_on(settings: WalkSettings, update: int, last_switch: int, first_mismatch: float, mismatch: float) -> bool:
    """Whether an adaptive walk moves on before this update; the decision is recorded in the run state."""
    stayed = update - last_switch
    if stayed < settings.interval:
        return False
    return stayed >= settings.most or mismatch < settings.share * first_mismatch
