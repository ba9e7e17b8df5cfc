"""This process among all of a run, and the few collectives that the stages need besides DeepSpeed's."""

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.group import set_environment
from trainer.distributed.launchers import end_with_launcher
from trainer.distributed.lock import locked
from trainer.distributed.rendezvous import COLLECTIVE_TIMEOUT, join_process_group
from trainer.errors import UserError


@dataclass(frozen=True)
class World:
    """This process: its rank, the number of processes, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Checks every node, then joins the process group (NCCL on GPUs, gloo on CPUs). Raises UserError or NodeTrouble where
    training cannot start."""
    set_environment()
    end_with_launcher()
    # DeepSpeed takes seconds to import: verbs without engines do without it.
    from deepspeed.accelerator import get_accelerator

    from trainer.distributed.deepspeed_comm import init_communication

    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])  # on its node, even where each task sees its own GPU only
    if dist.is_initialized():
        device = torch.device(accelerator.current_device_name())
    else:
        device = join_process_group(accelerator, accelerator.communication_backend_name())
    init_communication(COLLECTIVE_TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def finish() -> None:
    """Leaves the process group, if any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seeds the global random generators, which only libraries draw from (dropout): our own noise is a function of the
    sample (models.noise)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


@contextlib.contextmanager
def locked_for(what: str, files: Iterable[Path], remedy: str, world: World) -> Iterator[None]:
    """Rank 0 holds lock files for the whole run. Every rank must enter it; all raise UserError if another job has one."""
    with contextlib.ExitStack() as held:
        problem = None
        if world.main:
            try:
                for file in files:
                    held.enter_context(locked(file, what, remedy))
            except UserError as error:
                problem = str(error)
        if problem := first_problem(problem, world):
            raise UserError(problem)
        yield


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """Mean of a small tensor over all ranks, on every rank."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world.size
    return values


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum of a tensor over all ranks, on every rank."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """All ranks' rows in rank order, on every rank. Ranks may have different numbers of rows."""
    if world.size == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = int(max(counts))
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: object, world: World) -> list:
    """Every rank's value of a small picklable object, in rank order. A blocking collective, as `first_problem`."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def first_problem(problem: str | None, world: World) -> str | None:
    """The problem of the lowest rank that has one, on every rank, so that all raise it together and none is left waiting in
    a collective. A blocking collective: not for use in every step."""
    return next((p for p in gather_objects(problem, world) if p), None)


def node_group(world: World) -> dist.ProcessGroup:
    """Process group of this node's ranks. A node is a run of consecutive ranks whose local ranks count up from 0, as every
    launcher numbers them. Every rank must call it, and equally often."""
    local_ranks: list[int] = gather_objects(world.local_rank, world)
    starts = [rank for rank, local in enumerate(local_ranks) if local == 0]
    nodes = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], world.size], strict=True)]
    if any([local_ranks[rank] for rank in node] != list(range(len(node))) for node in nodes):
        raise UserError(
            f"local ranks {local_ranks} do not count up from 0 on each node, so teacher_node cannot find the nodes: use the "
            "teacher configuration, or a launcher that numbers ranks node by node"
        )
    groups = [dist.new_group(node) for node in nodes]  # new_group is collective: every rank creates every group
    return next(group for node, group in zip(nodes, groups, strict=True) if world.rank in node)


def from_main(value: object, world: World) -> object:
    """Rank 0's value of a small picklable object, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
