"""Which process this is and how many there are: the launcher's variables, checked. No torch, so that mistakes in them are
told at once."""

import os
import socket

from trainer.errors import RankError, UserError

NUMBERS, PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")
LEAST = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 1}
ALONE = "`unset RANK LOCAL_RANK WORLD_SIZE` runs one process"
REMEDY = f"torchrun, deepspeed and the scripts of slurm/ set them all; {ALONE}"

_rank = 0  # until `set_environment` has found it


def this_rank() -> int:
    """This process's rank; 0 in a verb that does not split its work, whatever the environment says."""
    return _rank


def started_by_srun() -> bool:
    """Whether the variables describe this process's own Slurm step."""
    own = (_plain("SLURM_PROCID"), _plain("SLURM_STEP_NUM_TASKS"))
    return own == (_plain("RANK"), _plain("WORLD_SIZE"))


def set_environment() -> tuple[int, int, int]:
    """Rank, number of processes and local rank. Sets the five variables of torch.distributed, unless a launcher did: from
    srun's, or for a single process.

    Raises RankError, since each process may have its own, if they are incomplete, empty or impossible: an interactive shell
    may have some of another job.
    """
    global _rank
    env = os.environ
    if not any(name in env for name in NUMBERS) and _whole("SLURM_STEP_NUM_TASKS", 1, default=1) > 1:
        _from_srun()
    if not any(name in env for name in NUMBERS):
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if _plain("RANK") == "0" and _plain("WORLD_SIZE") == "1":  # alone: the rest does not matter
        alone = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        env.update({name: value for name, value in alone.items() if not _plain(name)})
        if not _plain("MASTER_PORT"):
            env["MASTER_PORT"] = _free_port()
    if bad := [f"{name} is {'empty' if name in env else 'not set'}" for name in (*NUMBERS, *PLACE) if not _plain(name)]:
        given = ", ".join(f"{name}={env[name]}" for name in NUMBERS if _plain(name))
        raise RankError(f"launcher variables{f' {given}' if given else ''}: {', '.join(bad)}: {REMEDY}")
    rank, local, size, port = (_whole(name, least) for name, least in LEAST.items())
    if rank >= size or local >= size:
        wrong = f"RANK={rank}" if rank >= size else f"LOCAL_RANK={local}"
        raise RankError(
            f"launcher variables: {wrong} is not one of WORLD_SIZE={size} processes, 0 to {size - 1}: {ALONE}"
        )
    if port > 65535:
        raise RankError(f"launcher variables: MASTER_PORT={port} is not a port, 1 to 65535: set another one")
    _rank = rank
    return rank, size, local


def seconds(name: str, default: float) -> float:
    """A time limit in the environment. Raises UserError."""
    try:
        found = float(os.environ.get(name) or default)
        if found > 0:
            return found
    except ValueError:
        pass
    raise UserError(f"{name}={os.environ[name]}: must be a number of seconds above 0")


def _from_srun() -> None:
    """Of a step's own tasks, SLURM_STEP_NUM_TASKS: in an interactive shell SLURM_NTASKS is what the job could start."""
    env = os.environ
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    missing = next((name for name in (*names.values(), *PLACE) if not _plain(name)), None)
    if missing:
        raise UserError(
            f"srun starts {env['SLURM_STEP_NUM_TASKS']} tasks but {missing} is not set: export it in the job script, or use "
            "the scripts of slurm/"
        )
    env.update({name: env[theirs] for name, theirs in names.items()})


def _plain(name: str) -> str:
    return os.environ.get(name, "").strip()


def _whole(name: str, least: int, default: int | None = None) -> int:
    text = _plain(name)
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise RankError(
            f"launcher variables: {name}={os.environ[name]} is not a whole number from {least} on: {REMEDY}"
        )
    return int(text)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
