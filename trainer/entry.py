"""From a command line to a verb, and from its outcome to an exit code: 0 done, 2 a mistake of the user's, 75 stopped by a
signal after saving, 1 anything else.

Imports neither torch nor DeepSpeed, so that `--help` and mistakes in the configuration are answered at once.
"""

import argparse
import errno
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data.errors import DataError
from data.paths import expanded
from models.errors import ModelError
from trainer.config.load import load_settings
from trainer.config.schema import RunSettings
from trainer.distributed.group import set_environment, started_by_srun, this_rank
from trainer.distributed.job import write_exit_status
from trainer.distributed.launchers import end_with_launcher
from trainer.distributed.logs import no_progress_bars
from trainer.errors import NodeTrouble, RankError, Stopped, UserError

if TYPE_CHECKING:
    from trainer.training.run import Run

USER_MISTAKE, STOPPED, FAILED = 2, 75, 1
# File-system errors that may be gone at the next start: the job script restarts after these, but not after a mistake.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, so that its errors look like all others: one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def pattern_argument(text: str) -> str:
    """The type of arguments that are patterns of paths. A shell expands the ~ of `--out ~/x`, but not that of `--out=~/x`."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_argument(text: str) -> Path:
    """The type of arguments that are paths."""
    return Path(pattern_argument(text))


def spare_home() -> None:
    """Where HOME cannot be written, gives the libraries that keep something there a temporary folder. The hub's cache stays
    where it is, since it may be read there."""
    try:
        if os.access(Path.home(), os.W_OK):
            return
    except RuntimeError:  # there is no HOME
        pass
    folder = Path(tempfile.gettempdir(), f"disback-{os.getuid()}")
    for name in ("MPLCONFIGDIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(folder / name.lower()))


def guarded(action: Callable[[], None], debug: bool) -> int:
    """Runs an action; turns an exception into an exit code and one message on stderr."""
    spare_home()
    try:
        action()
        return 0
    except (UserError, DataError, ModelError, NodeTrouble) as error:
        if debug:
            traceback.print_exc()
        # Every process finds the same mistake: rank 0 reports it. What only one process met, that process reports.
        rank, code = this_rank(), USER_MISTAKE
        speaks = rank == 0 or isinstance(error, DataError | RankError)
        if isinstance(error, NodeTrouble):
            code, speaks = FAILED, error.speaks
        elif (getattr(error, "errno", None) or getattr(error.__cause__, "errno", None)) in TRANSIENT:
            code = FAILED
        message = f"{f'rank {rank}: ' if rank and code == USER_MISTAKE else ''}{error}"
        if speaks:
            write_exit_status(code, message)
        else:
            time.sleep(2)  # the launcher kills all processes when the first one exits: give rank 0 time to report
        # Still here: there may be no rank 0, but variables of another job. (srun does not kill them by itself.)
        if speaks or (code == USER_MISTAKE and not started_by_srun()):
            print(f"disback: {message}", file=sys.stderr, flush=True)
        return code
    except Stopped as stop:
        write_exit_status(STOPPED, str(stop))
        print(f"disback: {stop}", file=sys.stderr, flush=True)
        return STOPPED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        write_exit_status(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        traceback.print_exc()
        return FAILED


def _load(
    verb: str, about: str, argv: list[str], flags: dict[str, tuple[str, str]]
) -> tuple[RunSettings, argparse.Namespace]:
    parser = Parser(prog=f"disback {verb}", description=about)
    parser.add_argument("--config", required=True, type=path_argument, metavar="FILE.yaml")
    parser.add_argument("--fresh", action="store_true", help="refuse to resume: the run folder must have no checkpoint")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    for flag, (key, value) in flags.items():
        if value:
            parser.add_argument(flag, metavar=value, dest=key, help=f"short for {key}={value}")
        else:
            key, _, const = key.partition("=")
            const = const or "true"
            parser.add_argument(flag, action="store_const", const=const, dest=key, help=f"short for {key}={const}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args(argv)
    keys = [key.partition("=")[0] for key, _ in flags.values()]
    given = [f"{key}={value}" for key in keys if (value := getattr(args, key)) is not None]
    return load_settings(args.config, args.overrides + given), args


def settings_verb(verb: str, about: str, action: Callable[[RunSettings], None], argv: list[str] | None) -> int:
    """Parses `--config FILE.yaml [key=value ...]` and calls action(settings); returns the exit code. For verbs that only
    read files."""
    argv = sys.argv[1:] if argv is None else argv
    return guarded(lambda: action(_load(verb, about, argv, {})[0]), "--debug" in argv)


def run_verb(
    verb: str,
    about: str,
    action: Callable[["Run"], None],
    argv: list[str] | None,
    flags: dict[str, tuple[str, str]] | None = None,
) -> int:
    """Parses `--config FILE.yaml [key=value ...]`, joins the process group and calls action(run); returns the exit code.

    flags: the verb's own flags, each short for a setting: {"--out": ("export.out", "DIR")} takes a value,
    {"--watch": ("evaluate.watch", "")} is short for `evaluate.watch=true`, and ("a.b=false", "") for `a.b=false`.
    """
    argv = sys.argv[1:] if argv is None else argv

    def go() -> None:
        set_environment()
        end_with_launcher()
        settings, args = _load(verb, about, argv, flags or {})
        from trainer.distributed.world import seed_everything, start
        from trainer.training.run import Run

        no_progress_bars()
        world = start()
        seed_everything(settings.seed + world.rank)
        action(Run(settings, world, args.fresh))

    return guarded(go, "--debug" in argv)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Runs a verb's `main` and ends the process with its exit code."""
    code = main()
    if code not in (0, STOPPED):
        # The other ranks may hang in a collective, and a normal exit would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if "torch" in sys.modules:
        from trainer.distributed.world import finish

        finish()
    gc.freeze()  # or the interpreter's end would look through all that the libraries have made, for more than a second
    sys.exit(code)
