"""From a command line to a verb, and from what happened to an exit code: 0 done, 2 the user's mistake, 75 stopped on a
signal after saving, 1 anything else."""

import argparse
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from data.errors import DataError
from models.errors import ModelError
from trainer.config.load import load_settings
from trainer.distributed.job import leave_word
from trainer.distributed.logs import no_progress_bars
from trainer.distributed.world import finish, seed_everything, start
from trainer.errors import NodeTrouble, RankError, Stopped, UserError
from trainer.training.run import Run

USER_MISTAKE, STOPPED, FAILED = 2, 75, 1
# Trouble of a file system that may be over at the next start: a job is then started again, a mistake is not.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV}


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes in the same one-line form as all others."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def guarded(action: Callable[[], None], debug: bool) -> int:
    """Runs an action and turns what it raises into an exit code and one message on stderr."""
    try:
        action()
        return 0
    except (UserError, DataError, ModelError, NodeTrouble) as error:
        if debug:
            traceback.print_exc()
        # The same mistake is found by every process: rank 0 says it. What only another process met, it says itself.
        rank, code = int(os.environ.get("RANK", "0")), USER_MISTAKE
        speaks = rank == 0 or isinstance(error, DataError | RankError)
        if isinstance(error, NodeTrouble):
            code, speaks = FAILED, error.speaks
        elif (getattr(error, "errno", None) or getattr(error.__cause__, "errno", None)) in PASSING:
            code = FAILED
        if speaks:
            message = f"{f'rank {rank}: ' if rank and code == USER_MISTAKE else ''}{error}"
            leave_word(code, message)
            print(f"disback: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the launcher ends everybody when the first process ends: let rank 0 speak
        return code
    except Stopped as stop:
        leave_word(STOPPED, str(stop))
        print(f"disback: {stop}", file=sys.stderr, flush=True)
        return STOPPED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        leave_word(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        traceback.print_exc()
        return FAILED


def run_verb(
    verb: str,
    about: str,
    action: Callable[[Run], None],
    argv: list[str] | None,
    flags: dict[str, tuple[str, str]] | None = None,
) -> int:
    """Parses `--config FILE [key=value ...]`, joins the process group, runs the verb; returns the exit code.

    flags: a verb's own flags, each short for a setting: {"--out": ("export.out", "DIR")} takes a value,
    {"--watch": ("evaluate.watch", "")} stands for `evaluate.watch=true`; the key may say another value, "a.b=false".
    """
    parser = Parser(prog=f"disback {verb}", description=about)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument("--fresh", action="store_true", help="refuse to resume: the run folder must have no checkpoint")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    for flag, (key, value) in (flags or {}).items():
        if value:
            parser.add_argument(flag, metavar=value, dest=key, help=f"short for {key}={value}")
        else:
            key, _, const = key.partition("=")
            const = const or "true"
            parser.add_argument(flag, action="store_const", const=const, dest=key, help=f"short for {key}={const}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    argv = sys.argv[1:] if argv is None else argv

    def go() -> None:
        args = parser.parse_intermixed_args(argv)
        keys = [key.partition("=")[0] for key, _ in (flags or {}).values()]
        given = [f"{key}={value}" for key in keys if (value := getattr(args, key)) is not None]
        settings = load_settings(args.config, args.overrides + given)
        no_progress_bars()
        world = start()
        seed_everything(settings.seed + world.rank)
        action(Run(settings, world, args.fresh))

    code = guarded(go, "--debug" in argv)
    if code == 0 or code == STOPPED:
        finish()
    else:
        # After an error the other ranks may hang in a collective; do not wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
