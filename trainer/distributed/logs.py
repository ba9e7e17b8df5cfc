"""Keeps libraries' chatter out of a job's log: 64 processes would say everything 64 times. Errors still come through.

Import it before the libraries.
"""

import logging
import sys
from pathlib import Path


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


# DeepSpeed sets its logger's level itself when it is imported; a filter stays. It warns of every CPU-only machine.
logging.getLogger("DeepSpeed").addFilter(_errors_only)
# torch warns that a CUDA build has no GPU; xformers that its own extension was built for another torch (the operators
# that call PyTorch's kernels work all the same).
for _name in ("torch.utils.cpp_extension", "xformers"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def no_progress_bars() -> None:
    """Loading bars of diffusers and transformers: they take longer to read than the loading takes."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


log = logging.getLogger("disback")


def start_log(folder: Path, main: bool) -> None:
    """Messages of rank 0 go to stderr and to log.txt of the stage; other ranks only say what is an error."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.ERROR)
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(screen)
    if main:
        file = logging.FileHandler(folder / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
