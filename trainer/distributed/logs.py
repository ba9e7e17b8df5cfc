"""The run's log, without the messages of libraries, which 64 processes would print 64 times; their errors still appear.

Import it before the libraries.
"""

import logging
import sys
from pathlib import Path


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


# It warns on every CPU-only machine. A filter, since DeepSpeed sets its logger's level when it is imported.
logging.getLogger("DeepSpeed").addFilter(_errors_only)
# torch warns that a CUDA build sees no GPU, xformers that its extension was built for another torch (the operators that
# call PyTorch's kernels still work).
for _name in ("torch.utils.cpp_extension", "xformers"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def no_progress_bars() -> None:
    """Turns off the progress bars with which diffusers and transformers load models."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


log = logging.getLogger("disback")


class _Warnings(logging.Handler):
    """Collects warnings for `take_warnings`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


_warnings = _Warnings()


def take_warnings() -> list[str]:
    """The warnings since the last call, for the stage's status.json."""
    texts, _warnings.texts = _warnings.texts, []
    return texts


def start_log(folder: Path, main: bool) -> None:
    """Sends rank 0's messages to stderr and to the stage's log.txt; other ranks only print errors."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if main else logging.ERROR)
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(screen)
    take_warnings()  # of an earlier stage
    log.addHandler(_warnings)
    if main:
        file = logging.FileHandler(folder / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
