"""Processes: who am I, how many are we, and the few collectives that the stages need besides DeepSpeed's."""

import contextlib
import io
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.rendezvous import COLLECTIVE_TIMEOUT, environment, meet
from trainer.errors import UserError

STALE_LOCK_SECONDS = 900  # DeepSpeed's one-off build takes about a minute; older than this, its builder is dead


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def _check_compiler() -> None:
    """DeepSpeed builds one small communication kernel on CPU-only machines at its first start."""
    from torch.utils.cpp_extension import _get_build_directory, get_cxx_compiler

    # ninja comes with DeepSpeed's own requirements, but an environment that is not activated is not on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    lock = folder / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS:
        raise UserError(
            f"a killed build of DeepSpeed's kernel left {lock}: remove that file, or start would wait for ever"
        )
    needed = ["ninja"] if any(folder.glob("*.so")) else ["ninja", get_cxx_compiler()]
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"DeepSpeed builds its CPU communication kernel once, and {' and '.join(missing)} is not on PATH: install "
            "a C++ compiler (Debian: g++) and ninja (pip install ninja), or name another compiler with CXX"
        )


def start() -> World:
    """Joins the process group (nccl on GPUs, gloo on CPU), after a check of every node. Raises UserError or NodeTrouble
    where training could not start."""
    environment()
    import deepspeed  # slow to import: verbs that need no engines do without
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    local_rank = int(os.environ["LOCAL_RANK"])  # on its node, even where each task sees its own GPU only
    if dist.is_initialized():
        device = torch.device("cpu" if on_cpu else accelerator.current_device_name())
    else:
        device = meet(
            accelerator, accelerator.communication_backend_name(), _check_compiler if on_cpu else lambda: None
        )
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def finish() -> None:
    """Leaves the process group, if any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seeds the global generators: for what libraries draw (dropout); our own draws are per sample (models.noise)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """The mean of a small tensor over all ranks, on every rank."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world.size
    return values


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """Rows of all ranks, rank by rank, on every rank; the number of rows may differ."""
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


def first_problem(problem: str | None, world: World) -> str | None:
    """The first rank's problem, if any rank has one, on every rank: so that all raise it together and none is left
    waiting. Waits for every rank: not for every step."""
    if world.size == 1:
        return problem
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


def node_group(world: World) -> dist.ProcessGroup:
    """The group of this node's processes. A node is a run of ranks whose local ranks count up from 0, as every launcher
    numbers them. Every rank must call it, the same number of times."""
    locals_: list[int] = [0] * world.size
    dist.all_gather_object(locals_, world.local_rank)
    starts = [rank for rank, local in enumerate(locals_) if local == 0]
    nodes = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], world.size], strict=True)]
    if any([locals_[rank] for rank in node] != list(range(len(node))) for node in nodes):
        raise UserError(
            f"local ranks {locals_} do not count up from 0 on each node: teacher_node cannot tell the nodes"
        )
    groups = [dist.new_group(node) for node in nodes]  # every rank makes every group
    return next(group for node, group in zip(nodes, groups, strict=True) if world.rank in node)


def from_main(value: object, world: World) -> object:
    """Rank 0's value of a small picklable object, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
